"""Classes split over processes, against one process; and ranks that die, hang, or make different calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup
from typer.testing import CliRunner

from catseg_fast import CATSeg, Segmentation, SlidingWindow, reference
from catseg_fast.cli import main as cli
from catseg_fast.distributed.conductor import Conductor
from catseg_fast.engine.class_parallel import ClassShare, RankError
from catseg_fast.engine.engine import Engine
from support.aggregators import features, make_aggregator
from support.command_line import save_tiny_checkpoint
from support.process_group import single_process_group
from support.tiny import agree, picture, tiny_model

ROOT = Path(__file__).parent.parent
NAMES = ("wall", "building, edifice", "sky", "floor", "tree", "car", "cat", "dog", "road", "lamp", "sea")
IMAGE, OTHER = picture(40, 30), picture(26, 34, "other")
WINDOW = SlidingWindow(96, 0.25, (96, 140))  # two crops, and the whole image
POLICIES = ("resident", "offload", "recompute")
TOP_CLASSES = (
    "2 classes, padded to 8",
    "11 names of 3 classes, the best 2",
    "the best 4 of 11 classes in each crop",
    "v1",
)  # answers that have them
PATIENCE = 300.0  # seconds, on a busy machine
HASTE = 3.0  # seconds that a rank waits for one that hangs
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.xdist_group("processes"),
]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- equal to one process ---------------------------------------------------------------------------------


def answers(split: Callable[[CATSeg], None], every: bool = False) -> dict[str, Segmentation]:
    """Make the same calls of whole or split models; with `every`, the top classes are all classes."""
    found = {}

    def top(k: int | None) -> int | None:
        return len(NAMES) if every else k

    model = tiny_model("v2", NAMES[:5], sliding_window=False)
    split(model)
    found["5 classes, padded to 8"] = model.segment(IMAGE, top_k=top(None))
    model.set_classes(NAMES[:2])  # none for the third rank
    found["2 classes, padded to 8"] = model.segment(OTHER, top_k=top(5))
    model.set_classes(NAMES)
    model.max_classes = None
    for policy in POLICIES:
        model.engine.policy, model.engine.chunk = policy, 3
        found[f"11 classes, {policy}"] = model.segment(IMAGE, top_k=top(None))
    model.set_classes({"sea": "sea", "background": NAMES[:9], "lamp": "lamp"})  # on all ranks
    found["11 names of 3 classes"] = model.segment(IMAGE, top_k=top(None))
    found["11 names of 3 classes, the best 2"] = model.segment(IMAGE, top_k=top(2))
    model.set_classes(NAMES)
    model.engine.policy, model.sliding_window, model.window = None, True, WINDOW
    model.max_classes = 4
    found["the best 4 of 11 classes in each crop"] = model.segment(IMAGE, top_k=top(3))
    model.sliding_window = False
    model.engine.policy = "offload"
    pictures = [IMAGE, model.encode(OTHER)]
    found["two at once"], found["the second one"] = model.segment_batch(pictures, top_k=top(None))
    model.engine.policy = "recompute"
    batch = [{"image": IMAGE, "height": 20, "width": 30}, {"image": OTHER}]
    found["a call as upstream's"], found["its second image"] = model.label_map(batch, top_k=top(None))

    model = tiny_model("v1", NAMES[:7], sliding_window=False)
    split(model)
    found["v1"] = model.segment(IMAGE, top_k=top(9))
    return found


def small_aggregator(limit: int | None) -> reference.Aggregator:
    """Return an aggregator in float64; 7 classes are padded to 9, and pooled if only some are aggregated."""
    aggregator = make_aggregator(pooling_size=(1, 1) if limit is None else (2, 2), pad_len=9)
    aggregator.max_classes = limit
    return aggregator


@torch.no_grad()
def own_logits(group: ProcessGroup | None) -> dict[int | None, Tensor]:
    """Return the logits of a share's classes, `[B, t, 4H, 4W]`, by limit."""
    found = {}
    for limit in (None, 4):
        aggregator, parts = small_aggregator(limit), list[Tensor]()
        img_feats, text_feats, guidance = features(aggregator, 7)
        engine = Engine(aggregator)
        engine.share = ClassShare(NAMES[:7], group)
        vocabulary = engine.vocabulary(text_feats[:1, engine.share.own], limit)

        def keep(_: slice, part: Tensor, parts: list[Tensor] = parts) -> None:
            parts.append(part)

        engine.stream(img_feats, vocabulary, guidance, limit, lambda keep=keep: keep)
        found[limit] = torch.cat(parts, dim=1)
    return found


def save_answers(group: ProcessGroup | None, folder: Path) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.save(answers(lambda model: model.split_classes(group)), folder / f"{rank}-of-{ranks}.pt")
    torch.save(own_logits(group), folder / f"{rank}-of-{ranks}.logits.pt")


def notice_different_calls(rank: int) -> None:
    model = tiny_model("v2", NAMES[:5], sliding_window=False)
    model.split_classes()
    for difference in ("image", "top_k", "classes"):
        if difference == "classes":
            model.set_classes(NAMES[rank : rank + 5])
        image = IMAGE + rank if difference == "image" else IMAGE
        with pytest.raises(RankError, match="given different images, classes or settings"):
            model.segment(image, top_k=1 + rank if difference == "top_k" else None)


def segment_for_ever(group: ProcessGroup | None, mark: Path) -> None:
    """Segment until a rank is lost, and write the error to a file. Among all processes, rank 0 conducts."""
    model = tiny_model("v2", NAMES[:5], sliding_window=False)
    model.split_classes(group)
    conductor = Conductor(model) if group is None else None
    try:
        if conductor is not None and dist.get_rank() > 0:
            conductor.follow()
        while True:
            (conductor or model).segment(IMAGE.byte(), top_k=2)
            mark.with_suffix(".ready").touch()
    except RankError as error:
        mark.with_suffix(".part").write_text(str(error))
        os.replace(mark.with_suffix(".part"), mark.with_suffix(".error"))
        raise


def work(rank: int, folder: Path) -> None:
    """Run the steps of each of three processes."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=patience)
    pair, hasty = dist.new_group([0, 1]), dist.new_group([0, 1], timeout=timedelta(seconds=HASTE))
    try:
        save_answers(None, folder)
        if rank < 2:
            save_answers(pair, folder)
        notice_different_calls(rank)
        if rank < 2:
            with pytest.raises(RankError):
                segment_for_ever(hasty, folder / f"{rank}-hasty")
        segment_for_ever(None, folder / f"{rank}")
    except Exception:
        (folder / f"{rank}.traceback").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[list[Any]]:
    """Three processes at work."""
    context = mp.get_context("spawn")
    started = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(3)]
    for process in started:
        process.start()
    yield started
    for process in started:
        process.kill()
        process.join()


def until(processes: list[Any], *files: Path) -> None:
    """Wait for files that the processes write."""

    def ready() -> bool:
        failed = [path.read_text() for path in files[0].parent.glob("*.traceback")]
        assert not failed, failed[0]
        return all(file.exists() for file in files)

    wait_for(ready)


@pytest.fixture(scope="module")
def expected() -> dict[str, Segmentation]:
    return answers(lambda model: None, every=True)


def assert_answers(ranks: int, expected: dict[str, Segmentation], folder: Path) -> None:
    """Check labels and scores against one process, and logits in float64 against the reference."""
    for rank in range(ranks):
        found = torch.load(folder / f"{rank}-of-{ranks}.pt", weights_only=False)
        assert found.keys() == expected.keys()
        for case, every in expected.items():
            assert agree(found[case], every), f"{case} on rank {rank}"
            assert (found[case].top_labels is None) == (case not in TOP_CLASSES)
    parts = [torch.load(folder / f"{rank}-of-{ranks}.logits.pt") for rank in range(ranks)]
    for limit in parts[0]:
        aggregator = small_aggregator(limit)
        with torch.no_grad():
            exact = aggregator(*features(aggregator, 7))
        actual = torch.cat([part[limit] for part in parts], dim=1)
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ranks", [3, 2])
def test_several_processes_answer_as_one(
    ranks: int, processes: list[Any], expected: dict[str, Segmentation], folder: Path
) -> None:
    until(processes, *[folder / f"{rank}-of-{ranks}.logits.pt" for rank in range(ranks)])
    assert_answers(ranks, expected, folder)


@pytest.mark.usefixtures("alone")
def test_one_process_of_a_group_answers_as_one(expected: dict[str, Segmentation], tmp_path: Path) -> None:
    save_answers(None, tmp_path)
    assert_answers(1, expected, tmp_path)


def assert_lost(message: str, rank: int, ranks: int) -> None:
    assert message.startswith(f"class parallel: rank {rank} of {ranks} timed out waiting for the others")


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(processes: list[Any], folder: Path) -> None:
    until(processes, folder / "0-hasty.ready", folder / "1-hasty.ready")  # after calls that differ
    os.kill(processes[1].pid, signal.SIGSTOP)
    start = time.monotonic()
    until(processes, folder / "0-hasty.error")
    assert time.monotonic() - start < HASTE + 10
    os.kill(processes[1].pid, signal.SIGCONT)
    assert_lost((folder / "0-hasty.error").read_text(), 0, 2)


def test_a_rank_that_is_killed_ends_the_others(processes: list[Any], folder: Path) -> None:
    until(processes, folder / "0.ready")
    os.kill(processes[2].pid, signal.SIGKILL)
    for rank, process in enumerate(processes[:2]):
        process.join(PATIENCE / 2)
        assert process.exitcode == 1
        assert_lost((folder / f"{rank}.error").read_text(), rank, 3)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Process group of this process only."""
    with single_process_group(tmp_path):
        yield


# ---- command line -----------------------------------------------------------------------------------------


def test_torchrun_writes_what_one_process_does(tmp_path: Path) -> None:
    weights = save_tiny_checkpoint(tmp_path)
    images = [tmp_path / name for name in ("a.png", "bad.png", "b.png")]
    for path, image in zip(images, (IMAGE, OTHER, OTHER), strict=True):
        Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(path)
    images[1].write_bytes(b"no picture")
    arguments = ["segment", *images, "--weights", weights, "--device", "cpu"]
    arguments = [*map(str, arguments), "--classes", "; ".join(NAMES), "--whole"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "catseg_fast", *arguments, "--class-parallel", "--batch", "2"]
    command += ["-o", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    two = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    one = CliRunner().invoke(cli.app, [*arguments, "-o", str(tmp_path / "one")])
    assert two.returncode == one.exit_code == 1, two.stderr
    assert two.stdout.count("a.overlay.png") == 1  # only rank 0 prints
    assert two.stderr.count("cannot read") == two.stderr.count("1 of 3 images failed") == 1
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 6
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    model = CATSeg.from_pretrained(weights, NAMES, device="cpu")
    for name in ("a", "b"):
        files = (tmp_path / folder / f"{name}.labels.png" for folder in ("one", "two"))
        first, second = (torch.from_numpy(np.asarray(Image.open(path)).astype(int)) for path in files)
        best, next_best = model.segment(tmp_path / f"{name}.png", sliding_window=False, top_k=2).top_scores
        assert bool(((best - next_best)[first != second] < 1e-5).all())  # the same except for ties


def test_class_parallel_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(cli.app, ["segment", "photo.png", "--class-parallel"])
    assert result.exit_code == 1
    assert "error: --class-parallel: torchrun must start the processes" in result.stderr
    assert "RANK is not set" in result.stderr
