"""The parts of the page that limit what its visitors use, without a server."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg
from support.tiny import CLASSES, picture, tiny_model

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'catseg-fast[app]'")

from catseg_fast.app import page as page_module  # noqa: E402
from catseg_fast.app.guard import Guard, take_turns  # noqa: E402
from catseg_fast.app.jobs import Job, Jobs, Stopped  # noqa: E402
from catseg_fast.app.limits import Limits  # noqa: E402
from catseg_fast.app.page import picture as choice  # noqa: E402
from catseg_fast.app.visitors import Kept, Visitors  # noqa: E402
from catseg_fast.app.workbench import Workbench, load_photo  # noqa: E402

pytestmark = pytest.mark.xdist_group("app")


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(48, 64, "photo").byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", max_classes=None, text_cache=False)


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
        torch.zeros(1).add(1)  # the clean-up continues


def test_a_model_goes_on_after_a_stopped_call(model: CATSeg, tmp_path: Path) -> None:
    """The model answers as before, wherever it was stopped."""
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
    """A 16-bit grey ramp stays a ramp; Gradio's own component makes it white."""
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
