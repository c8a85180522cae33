"""The page under several visitors over HTTP, one of whom is hostile: limits, turns, and calls that stop."""

from __future__ import annotations

import io
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from support.page_client import Client
from support.tiny import CLASSES, picture, tiny_model

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'catseg-fast[app]'")

from catseg_fast.app.guard import calls_of  # noqa: E402
from catseg_fast.app.limits import Limits  # noqa: E402
from catseg_fast.app.page import PageBlocks, build_page, serve  # noqa: E402

pytestmark = pytest.mark.xdist_group("app")

VOCABULARIES = ["; ".join(CLASSES), "sea; road", "grass; sand; snow", "cat; dog; bird; fish"]
LIMITS = Limits(names=200, upload=2**20, request=2**18, uploads=3 * 2**20, seconds=60, seconds_shared=30)


def png(height: int = 48, width: int = 64, name: str = "photo") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(height, width, name).byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


@contextmanager
def served(model: CATSeg, limits: Limits) -> Iterator[tuple[str, PageBlocks]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build_page(model, limits=limits)
    yield serve(page, "127.0.0.1", port, wait=False), page
    page.close()


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", max_classes=None, text_cache=False)


@pytest.fixture(scope="module")
def server(model: CATSeg) -> Iterator[tuple[str, PageBlocks]]:
    with served(model, LIMITS) as found:
        yield found


@pytest.fixture
def page(server: tuple[str, PageBlocks]) -> Any:
    return server[1].handlers


@pytest.fixture
def client(server: tuple[str, PageBlocks]) -> Client:
    return Client(server[0])


@contextmanager
def held(page: Any) -> Iterator[threading.Event]:
    """Let calls wait, with operations of PyTorch meanwhile, at which they can be stopped."""
    go, inside = threading.Event(), threading.Event()
    segment = page.bench.segment

    def slow(*args: Any, **options: Any) -> Any:
        inside.set()
        while not go.wait(0.01):
            torch.zeros(1).add(1)
        return segment(*args, **options)

    page.bench.segment = slow
    try:
        yield inside
    finally:
        go.set()
        del page.bench.segment


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_six_visitors_one_of_them_hostile(server: tuple[str, PageBlocks], model: CATSeg) -> None:
    """Five get their own answers, while the sixth exceeds every limit."""
    address, page = server
    uploaded = Client(address).upload(png())[1]
    expected = {}
    for text in VOCABULARIES:
        answer = Client(address).segment(uploaded, text)
        assert answer.success, answer.error
        expected[text] = (answer.classes, answer.data[0]["labels"])
    hostile, stop = Client(address), threading.Event()
    refusals: list[str] = []

    def attack() -> None:
        while not stop.is_set():
            refusals.append(hostile.segment(uploaded, "; ".join(f"c{i}" for i in range(201))).error)
            refusals.append(hostile.segment(uploaded, "; ".join(f"c{i}" for i in range(10**5))).error)
            refusals.append(hostile.upload(bytes(2**21))[1])
            for _ in range(4):
                refusals.append(str(Client(address, hostile.session).join_segment(uploaded, "a; b")[1]))
            refusals.append(hostile.segment("/etc/passwd", "a; b").error)

    answers: list[tuple[str, Any]] = []

    def visit(number: int) -> None:
        visitor = Client(address)
        for turn in range(3):
            text = VOCABULARIES[(number + turn) % len(VOCABULARIES)]
            answers.append((text, visitor.segment(uploaded, text)))

    attacker = threading.Thread(target=attack)
    attacker.start()
    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(5)]
    for thread in visitors:
        thread.start()
    for thread in visitors:
        thread.join()
    stop.set()
    attacker.join()
    assert soon(lambda: not calls_of(page))
    assert len(answers) == 15
    for text, answer in answers:
        assert answer.success, answer.error
        assert (answer.classes, answer.data[0]["labels"]) == expected[text]
    assert any("201 names; this page takes 200" in refusal for refusal in refusals)
    assert any("larger than" in refusal for refusal in refusals)
    assert any("not done yet" in refusal for refusal in refusals)
    assert page.handlers.visitors.nbytes <= LIMITS.kept


def test_the_queue_shows_its_places(server: tuple[str, PageBlocks], page: Any) -> None:
    address, _ = server
    uploaded = Client(address).upload(png())[1]
    answers: list[Any] = []

    def visit(visitor: Client) -> None:
        answers.append(visitor.wait())

    with held(page) as inside:
        threads = []
        for _ in range(4):
            visitor = Client(address)
            assert visitor.join_segment(uploaded, "sea; road")[0] == 200
            threads.append(threading.Thread(target=visit, args=(visitor,)))
            threads[-1].start()
            assert inside.wait(20)
        assert soon(lambda: len(server[1]._queue) == 3)
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert [answer.success for answer in answers] == [True] * 4
    assert {place for answer in answers for place in answer.places} >= {0, 1, 2}
    assert max(size for answer in answers for size in answer.sizes) == 3
    assert soon(lambda: not calls_of(server[1]))


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_a_call_ends_when_the_visitor_stops_it_or_leaves(
    server: tuple[str, PageBlocks], page: Any, way: str
) -> None:
    """The next visitor is served at once, with the right answer."""
    address, _ = server
    visitor = Client(address)
    uploaded = visitor.upload(png())[1]
    with held(page) as inside:
        status, event = visitor.join_segment(uploaded, "sea; road")
        assert status == 200
        messages = visitor.messages()
        next(messages)
        assert inside.wait(20)
        assert visitor.session in page.jobs._jobs
        if way == "stop":
            assert visitor.cancel(event) == 200
        messages.close()
        assert soon(lambda: visitor.session not in page.jobs._jobs)
    assert Client(address).segment(uploaded, "sea; road").success
    assert page.visitors.get(visitor.session) is None


def test_a_call_that_waits_can_be_stopped(server: tuple[str, PageBlocks], page: Any) -> None:
    address, blocks = server
    first, second = Client(address), Client(address)
    uploaded = first.upload(png())[1]
    with held(page) as inside:
        first.join_segment(uploaded, "sea; road")
        assert inside.wait(20)
        _, event = second.join_segment(uploaded, "sea; road")
        assert soon(lambda: len(blocks._queue) == 1)
        assert second.cancel(event) == 200
        assert len(blocks._queue) == 0
    assert first.wait().success
    assert soon(lambda: not calls_of(blocks))


def test_large_uploads_and_requests_are_refused(client: Client, server: tuple[str, PageBlocks]) -> None:
    status, text = client.upload(bytes(LIMITS.upload + 2**17))
    assert (status, "larger than 1 MiB" in text) == (413, True)

    def parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
        yield from (bytes(2**16) for _ in range(40))
        yield b"\r\n--x--\r\n"

    head = {"Content_Type": "multipart/form-data; boundary=x", "Transfer_Encoding": "chunked"}
    assert client.request("/gradio_api/upload", parts(), **head)[0] == 413
    status, text = client.join_segment(None, "a" * 2**19)
    assert (status, "larger than" in text) == (413, True)


def test_the_disk_is_not_filled(model: CATSeg) -> None:
    with served(model, LIMITS) as (address, _):
        client = Client(address)
        statuses = [client.upload(secrets.token_bytes(900_000))[0] for _ in range(6)]
    assert statuses == [200, 200, 200, 429, 429, 429]


def test_score_maps_of_an_answer_that_is_gone(server: tuple[str, PageBlocks], page: Any) -> None:
    visitor = Client(server[0])
    uploaded = visitor.upload(png())[1]
    assert visitor.segment(uploaded, "sea; road").success
    request = gradio.Request(session_hash=visitor.session)
    assert page.score_map(1, request)["name"] == "road"
    page.leave(request)
    with pytest.raises(gradio.Error, match="segment again"):
        page.score_map(1, request)
