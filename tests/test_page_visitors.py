"""The page under several visitors over HTTP, one of whom is hostile: limits, turns, and calls that stop."""

from __future__ import annotations

import io
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from support.page_client import Client
from support.tiny import CLASSES, picture, tiny_model

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'catseg-fast[app]'")

from catseg_fast.app import page as page_module  # noqa: E402
from catseg_fast.app.guard import Guard, calls_of, take_turns  # noqa: E402
from catseg_fast.app.jobs import Job, Jobs, Stopped  # noqa: E402
from catseg_fast.app.limits import Limits  # noqa: E402
from catseg_fast.app.page import PageBlocks, build_page, serve  # noqa: E402
from catseg_fast.app.page import picture as choice  # noqa: E402
from catseg_fast.app.visitors import Kept, Visitors  # noqa: E402
from catseg_fast.app.workbench import Workbench, load_photo  # noqa: E402

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
    """Let calls wait within an operation of PyTorch's sort: at any time they can be stopped."""
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
    """Five get their own answers, while the sixth sends what is too much in every way."""
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


def test_a_call_takes_its_time_and_no_more() -> None:
    waiting = [False]
    job = Job(seconds=1000, seconds_shared=10, others_wait=lambda: waiting[0])
    job.begin()
    job.check()
    job._begin -= 20  # type: ignore[operator]
    job.check()
    waiting[0] = True
    with pytest.raises(Stopped, match="Stopped after 20 s, as others wait"):
        job.check()
    job._begin -= 2000  # type: ignore[operator]
    with pytest.raises(Stopped, match="Stopped after 1000 s, the most"):
        job.check()


def test_one_job_at_a_time_and_the_last_one_of_a_session() -> None:
    jobs = Jobs(100, 100)
    inside, ended = threading.Event(), []

    def first() -> None:
        try:
            with jobs.running("a"):
                inside.set()
                while True:
                    torch.zeros(1).add(1)
        except Stopped as error:
            ended.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    with jobs.running("a"):  # the same visitor again
        assert ended == ["Stopped."]
    thread.join()
    jobs.stop("nobody")
    with jobs.running("b"):
        jobs.stop("b")
        with pytest.raises(Stopped):
            torch.zeros(1).add(1)
        torch.zeros(1).add(1)  # what cleans up goes on


def test_a_model_goes_on_after_a_stopped_call(tmp_path: Path) -> None:
    """Wherever it was stopped."""
    model = tiny_model("v2", max_classes=None, text_cache=False)  # the server may be using the other one
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    bench = Workbench(model)
    expected = bench.segment(path, CLASSES, sliding_window=False)[1]
    jobs = Jobs(100, 100)
    for steps in (1, 10, 100, 300, 600):
        stopped = False
        try:
            with jobs.running("a") as job:
                checks = iter(range(steps))
                job.others_wait = lambda checks=checks: next(checks, None) is None  # type: ignore[misc]
                job.seconds_shared = -1
                bench.segment(path, ("sea", f"road {steps}"), sliding_window=False)
        except Stopped:
            stopped = True
        assert stopped
        assert torch.is_grad_enabled()
        again = bench.segment(path, CLASSES, sliding_window=False)[1]
        assert torch.equal(again.labels, expected.labels)
        assert torch.equal(again.scores, expected.scores)


def kept(model: CATSeg, path: Path) -> Kept:
    loaded, segmentation, _ = Workbench(model).segment(path, CLASSES, sliding_window=False)
    return Kept(loaded, segmentation)


def test_what_is_kept_of_visitors_is_bounded(model: CATSeg, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    one, now = kept(model, path), [0.0]
    assert one.segmentation.logits is not None
    assert one.nbytes > one.segmentation.logits.nbytes + one.loaded.encoded.nbytes
    visitors = Visitors(3, 10 * one.nbytes, 100, lambda: now[0])
    for session in "abcd":
        assert visitors.put(session, one) is one
    assert [session for session in "abcd" if visitors.get(session)] == ["b", "c", "d"]
    visitors.get("b")
    visitors.put("e", one)
    assert [session for session in "bcde" if visitors.get(session)] == ["b", "d", "e"]
    visitors.forget("e")
    now[0] = 101
    assert len(visitors) == 2
    assert visitors.get("b") is None
    assert len(visitors) == 0

    tight = Visitors(10, int(2.5 * one.nbytes), 100)
    for session in "abc":
        tight.put(session, one)
    assert len(tight) == 2
    assert tight.nbytes <= tight.most_bytes
    small = Visitors(10, one.nbytes - 1, 100)
    reduced = small.put("a", one)
    assert reduced is not None
    assert reduced.segmentation.logits is None
    assert Visitors(10, 10, 100).put("a", one) is None


def test_logits_above_their_limit_are_not_kept(model: CATSeg, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    exact = kept(model, path).segmentation.logits
    assert exact is not None
    for most, has in ((exact.nbytes, True), (exact.nbytes - 1, False)):
        answer = Workbench(model, most).segment(path, CLASSES, sliding_window=False)[1]
        assert (answer.logits is not None) == has


def test_score_maps_of_an_answer_that_is_gone(server: tuple[str, PageBlocks], page: Any) -> None:
    visitor = Client(server[0])
    uploaded = visitor.upload(png())[1]
    assert visitor.segment(uploaded, "sea; road").success
    request = gradio.Request(session_hash=visitor.session)
    assert page.score_map(1, request)["name"] == "road"
    page.leave(request)
    with pytest.raises(gradio.Error, match="segment again"):
        page.score_map(1, request)


def test_network_addresses_take_turns() -> None:
    def call(address: str, number: int) -> Any:
        return SimpleNamespace(request=SimpleNamespace(client=SimpleNamespace(host=address)), number=number)

    order = [call("a", 0), call("a", 1), call("a", 2), call("b", 3), call("a", 4), call("c", 5), call("b", 6)]
    queue = SimpleNamespace(queue=order)
    blocks = SimpleNamespace(_queue=SimpleNamespace(event_queue_per_concurrency_id={"x": queue}))
    take_turns(blocks)  # type: ignore[arg-type]
    assert [each.number for each in queue.queue] == [0, 3, 5, 1, 6, 2, 4]
    take_turns(blocks)  # type: ignore[arg-type]
    assert [each.number for each in queue.queue] == [0, 3, 5, 1, 6, 2, 4]


def test_connections_are_counted() -> None:
    import asyncio

    async def run() -> list[int]:
        statuses: list[int] = []
        release = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        guard = Guard(
            app,
            limits=Limits(connections=2),
            blocks=lambda: None,
            leave=lambda session: None,  # type: ignore
        )
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        calls = [asyncio.create_task(guard(scope, None, send)) for _ in range(3)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert statuses == [503]
        release.set()
        await asyncio.gather(*calls)
        return statuses

    assert asyncio.run(run()) == [503, 200, 200]


def test_the_component_does_not_decode(tmp_path: Path) -> None:
    """A 16-bit grey ramp stays one; Gradio's own component makes it white."""
    from gradio.components.image import ImageData

    path = tmp_path / "ramp.png"
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(path)
    shown = choice().preprocess(ImageData(path=str(path), orig_name=path.name))
    assert shown == str(path)
    expected = np.round(ramp / 257).astype(np.uint8)
    assert np.array_equal(load_photo(shown)[0].numpy(), expected)
    assert choice().preprocess(None) is None
    assert not list(Path(page_module.__file__).parent.glob("*.pyi"))  # Gradio writes them for subclasses
