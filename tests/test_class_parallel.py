"""Classes split over processes, against one process; and ranks that die, hang, or do different things."""

from __future__ import annotations

import os
import re
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
from catseg_fast.inference.readout import LabelMap, TopClasses
from support.aggregators import features, make_aggregator
from support.command_line import save_tiny_checkpoint
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
PATIENCE = 300.0  # seconds, on a machine that is busy with other tests
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
    """The same calls, of whole models or of split ones; with `every`, all classes are the top ones."""
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
    """A small aggregator in float64; 7 classes are padded to 9, and pooled if only some are aggregated."""
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
    """Until a rank is lost: then the error is written to a file. Among all processes, rank 0 conducts."""
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
    """Labels and scores as of one process, and logits in float64 as of the reference."""
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
    until(processes, folder / "0-hasty.ready", folder / "1-hasty.ready")  # past calls that differ, too
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


# ---- one process: shares, merging, refusals ---------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_even_and_in_order(classes: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    share = ClassShare(tuple(map(str, range(classes))))
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    held, sizes = [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        held += share.classes[share.own]
        sizes.append(share.own.stop - share.own.start)
    assert tuple(held) == share.classes
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("alone")
def test_ranks_are_merged_as_one_map_with_ties_and_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, the second without a class."""
    maps = torch.rand(9, 5, 7, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)
    maps[3, 0, 0] = maps[4, 0, 0] = -torch.tensor(torch.nan)
    maps[:, 1, 1] = 0
    names, bounds = tuple(map(str, range(9))), [(0, 4), (4, 4), (4, 9)]

    def merge(count: int, new: Callable[[], Any]) -> list[Any]:
        """The merged targets. Ranks take turns: what they reduce is known once all have been asked for it."""
        rounds: list[Tensor] = []
        while True:
            targets: list[Any] = []
            asked: list[Tensor] = []
            for start, stop in bounds:
                target, seen = new(), iter(range(count))
                if start < stop:
                    target.update(start, maps[start:stop])

                def reduce(
                    _: ClassShare, keys: Tensor, operation: Any, seen: Any = seen, asked: Any = asked
                ) -> None:
                    turn = next(seen)
                    if turn < len(rounds):
                        keys.copy_(rounds[turn])
                    elif turn == len(rounds):
                        asked.append(keys.clone())

                monkeypatch.setattr(ClassShare, "own", slice(start, stop))
                monkeypatch.setattr(ClassShare, "_reduce", reduce)
                ClassShare(names).merge(target, count)
                targets.append(target)
            if len(rounds) == count:
                return targets
            rounds.append(torch.stack(asked).amax(dim=0))

    size, device = (5, 7), torch.device("cpu")
    whole, best = LabelMap(size, device), TopClasses(4, size, device)
    for target in (whole, best):
        target.update(0, maps)
    for merged in merge(1, lambda: LabelMap(size, device)):
        assert torch.equal(merged.labels, whole.labels)
        torch.testing.assert_close(merged.scores, whole.scores, rtol=0, atol=0, equal_nan=True)
    for merged in merge(4, lambda: TopClasses(4, size, device)):
        assert torch.equal(merged.labels, best.labels)
        torch.testing.assert_close(merged.scores, best.scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("alone")
def test_what_a_split_model_refuses() -> None:
    model = tiny_model("v2", NAMES, sliding_window=False)
    model.split_classes()
    assert "ranks      1; rank 0, this one, has 11 of the classes" in model.explain()
    with pytest.raises(RuntimeError, match=r"no rank has all classes; call segment\(\) or label_map\(\)"):
        model([{"image": IMAGE}])
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.set_classes(NAMES, training=True)
    with pytest.raises(ValueError, match="is listed twice"):
        model.set_classes(["sky", "sky"])
    assert model.classes == NAMES
    with pytest.raises(RuntimeError, match="no rank has all logits"):
        model.engine.logits(torch.zeros(1, 32, 24, 24), torch.zeros(1, 3, 1, 32), [None] * 3, None)
    with pytest.raises(RuntimeError, match="segment with keep_logits=False"):
        model.segment(IMAGE, keep_logits=True)
    with pytest.raises(ValueError, match="top_k: 0 is not positive"):
        model.segment(IMAGE, top_k=0)
    model.backend = "reference"
    with pytest.raises(RankError, match="the back end 'reference' takes all classes at once"):
        model.segment(IMAGE)


@pytest.mark.usefixtures("alone")
def test_softmax_attention_is_refused() -> None:
    aggregator = make_aggregator(attention_type="full")
    img_feats, text_feats, guidance = features(aggregator, 3)
    engine = Engine(aggregator)
    engine.share = ClassShare(NAMES[:3])
    vocabulary = engine.vocabulary(text_feats[:1], None)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_type 'full' needs the key and value"):
        engine.stream(img_feats, vocabulary, guidance, None, lambda: lambda classes, logits: None)
    with pytest.raises(RuntimeError, match="no gradients pass between ranks"):
        engine.stream(img_feats, vocabulary, guidance, None, lambda: lambda classes, logits: None)


# ---- what goes over the wire ------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_what_is_exchanged_does_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce, sent = ClassShare._reduce, list[int]()

    def counted(self: ClassShare, tensor: Tensor, operation: Any) -> None:
        sent.append(tensor.nbytes)
        reduce(self, tensor, operation)

    monkeypatch.setattr(ClassShare, "_reduce", counted)
    model = tiny_model("v2", NAMES, sliding_window=False, max_classes=None)
    model.split_classes()
    for classes in (NAMES, NAMES[:3]):
        model.set_classes(classes)
        sent.clear()
        model.segment(IMAGE)
        *sums, label_map = (size for size in sent if size != 16)  # checks that all do the same
        assert len(sent) == len(sums) + 3
        assert sums == [576 * 4 * 8 * 8 * 4, 576 * 4 * 8 * 4] * 2  # two layers, 4 heads of 8 channels
        assert label_map == 8 * 40 * 30


def test_the_notes_figures_are_those_of_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    note = (ROOT / "docs" / "class_parallel.md").read_text(encoding="utf-8")
    (formula,) = re.findall(r"^```python\n(from math.*?)^```$", note, flags=re.MULTILINE | re.DOTALL)
    exec(compile(formula, "class_parallel.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert [line for line in note.splitlines() if re.match(r"\| \w+ x \d+ \|", line)] == printed


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
    assert two.stdout.count("a.overlay.png") == 1  # rank 0 alone speaks
    assert two.stderr.count("cannot read") == two.stderr.count("1 of 3 images failed") == 1
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 6
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    model = CATSeg.from_pretrained(weights, NAMES, device="cpu")
    for name in ("a", "b"):
        files = (tmp_path / folder / f"{name}.labels.png" for folder in ("one", "two"))
        first, second = (torch.from_numpy(np.asarray(Image.open(path)).astype(int)) for path in files)
        best, next_best = model.segment(tmp_path / f"{name}.png", sliding_window=False, top_k=2).top_scores
        assert bool(((best - next_best)[first != second] < 1e-5).all())  # the same but for ties


def test_class_parallel_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(cli.app, ["segment", "photo.png", "--class-parallel"])
    assert result.exit_code == 1
    assert "error: --class-parallel: torchrun must start the processes" in result.stderr
    assert "RANK is not set" in result.stderr
