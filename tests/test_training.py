"""Training runs: interruptions, several processes, parts of a batch, failures."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.checkpoints.checkpoint import read_checkpoint
from catseg_fast.training import trainer as trainer_module
from catseg_fast.training.checkpoints import Checkpoints
from catseg_fast.training.samples import choose_classes
from catseg_fast.training.trainer import Step
from support.training_run import CLASSES, Blocks, make_trainer, trained

TESTS = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
pytestmark = pytest.mark.xdist_group("training")  # one process makes the run to compare with


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folder and weights of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder)
    trainer.run()
    return folder, trained(trainer)


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.training_run", str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_same_bits(
    uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    killed = start(tmp_path, "--kill", "2")
    output, _ = killed.communicate(timeout=900)
    assert killed.returncode == -signal.SIGKILL, output
    trainer = make_trainer(tmp_path)
    assert trainer.resume()
    assert trainer.step == 2
    trainer.run()
    folder, expected = uninterrupted
    for name, parameter in trained(trainer).items():
        assert torch.equal(parameter, expected[name]), name
    found, whole = ([(x["step"], x["loss"], x["lr"]) for x in lines(place)] for place in (tmp_path, folder))
    assert found == whole


def test_two_processes_are_one_with_the_whole_batch(
    uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(2)]
    for child in children:
        output, _ = child.communicate(timeout=900)
        assert child.returncode == 0, output
    folder, expected = uninterrupted
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
    assert_trained_alike(first, expected)
    losses = [[x["loss"] for x in lines(place)] for place in (tmp_path, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_batch_in_parts_is_the_whole_batch(
    uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, accumulate=2)
    trainer.run()
    assert_trained_alike(trained(trainer), uninterrupted[1])


def assert_trained_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Adam makes a whole step of any gradient, so signs differ where the gradient is only rounding."""
    start = dict(make_trainer(Path()).model.named_parameters())
    moved = torch.cat([(expected[name] - start[name].detach()).flatten() for name in expected])
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert moved.norm() > 0
    assert apart.norm() <= 0.02 * moved.norm()


def test_the_loss_falls_and_the_log_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=6, batch_size=1, save_every=4)
    steps: list[Step] = []
    trainer.run(steps.append)
    written = lines(tmp_path)
    assert [entry["step"] for entry in written] == list(range(6))
    assert [entry["loss"] for entry in written] == [step.loss for step in steps]
    assert written[-1]["loss"] < 0.95 * written[0]["loss"]
    assert written[0]["lr"] == trainer.recipe.learning_rate(0)
    assert all(entry["classes"] == len(CLASSES) and entry["grad_norm"] > 0 for entry in written)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.value for event in events] == pytest.approx([step.loss for step in steps])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_are_written_under_upstreams_keys(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    path = trainer.export(dtype)
    state = read_checkpoint(path)
    assert state.keys() == trainer.model.state_dict().keys()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}
    model = CATSeg(trainer.model.variant, CLASSES)
    model.load_state_dict(state)
    assert torch.equal(model.aggregator.head.weight, trainer.model.aggregator.head.weight.to(dtype).float())


def test_checkpoints_of_a_run_are_checkpoints_of_the_model(
    uninterrupted: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, expected = uninterrupted
    state = read_checkpoint(Checkpoints(folder / "checkpoints").path(4))
    assert all(torch.equal(state[name], parameter) for name, parameter in expected.items())


def test_the_step_sees_fewer_classes_under_other_names(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, classes_per_step=4, random_synonyms=True, steps=3, crop_size=32)
    names: list[tuple[str, ...]] = []
    steps: list[Step] = []

    def report(step: Step) -> None:
        names.append(trainer.model.classes)
        steps.append(step)

    trainer.run(report)
    known = {name for label in CLASSES for name in label.split(", ")}
    assert all(set(step) <= known for step in names)
    assert [step.classes for step in steps] == list(map(len, names))
    assert all(4 <= len(step) <= len(CLASSES) for step in names)
    assert len(set(names)) > 1


def test_the_number_of_classes_is_drawn_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int | None] = []

    def noted(labels, total, ignore_label, count, rng):  # type: ignore[no-untyped-def]
        numbers.append(count)
        return choose_classes(labels, total, ignore_label, count, rng)

    monkeypatch.setattr(trainer_module, "choose_classes", noted)
    recipe = {"classes_per_step": 5, "fewest_classes": 2, "steps": 12}
    trainer = make_trainer(tmp_path, **recipe)
    batch = [trainer.pictures[0]]
    for trainer.step in range(12):
        trainer._choose_classes(batch)
    assert set(numbers) == {2, 3, 4, 5}
    first = list(numbers)
    for trainer.step in range(12):
        trainer._choose_classes(batch)
    assert numbers == first * 2  # a step draws the same number again, as a run that continues must


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=1)

    def spoil(step: Step) -> None:
        if step.step == 1:
            trainer.model.aggregator.head.bias.data.fill_(torch.nan)

    with pytest.raises(RuntimeError, match="the loss is nan in step 2, with the pictures picture-") as caught:
        trainer.run(spoil)
    kept = Checkpoints(tmp_path / "checkpoints").path(2)
    assert str(kept) in str(caught.value)
    state = read_checkpoint(kept)
    assert all(x.isfinite().all() for x in state.values())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.aggregator.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = trainer.model.aggregator.conv1.weight.detach().clone()
    message = "the norm of the gradient is nan in step 0, with .*; no checkpoint yet"
    with pytest.raises(RuntimeError, match=message):
        trainer.run()
    assert torch.equal(trainer.model.aggregator.conv1.weight, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    save = torch.save

    def save_without_room(content: Any, _: Any) -> None:
        with Path("/dev/full").open("wb") as full:
            save(content, full)

    def fill_disk(step: Step) -> None:
        if step.step == 1:
            monkeypatch.setattr(torch, "save", save_without_room)

    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.run(fill_disk)
    assert caught.value.errno == errno.ENOSPC
    assert Path(caught.value.filename).name == "step-00000004.pt"
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002.pt"]
    again = make_trainer(tmp_path)
    assert again.resume()
    assert again.step == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [2, 3]
    checkpoints.path(3).write_bytes(checkpoints.path(3).read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=r"step-00000003\.pt is damaged"):
        assert checkpoints.load() == {"step": 2}
    checkpoints.path(2).write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoints.load()


def test_another_run_is_not_gone_on_with(uninterrupted: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = uninterrupted
    other = make_trainer(folder, lr=5e-4, seed=8)
    with pytest.raises(ValueError, match=r"holds another run:\n  lr: 0.001 there, 0.0005 here\n  seed: 7"):
        other.resume()


def test_other_pictures_of_the_same_number_are_another_run(
    uninterrupted: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = uninterrupted
    monkeypatch.setattr(Blocks, "fingerprint", lambda self: "others")
    with pytest.raises(ValueError, match=r"run:\n  data: five pictures of blocks there, others here$"):
        make_trainer(folder).resume()


def test_starting_over(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=2, batch_size=1)
    trainer.run()
    again = make_trainer(tmp_path, steps=2, batch_size=1)
    again.start_over()
    assert not again.resume()
    again.run()
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits(precision: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precision=precision, steps=2, batch_size=1)
    steps: list[Step] = []
    trainer.run(steps.append)
    assert all(0 < step.loss < 2 for step in steps)
    assert all(parameter.dtype == torch.float32 for parameter in trained(trainer).values())
    assert trainer.scaler.is_enabled() == (precision == "fp16")


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate: 3 does not divide the batch size, 4"):
        make_trainer(tmp_path, batch_size=4, accumulate=3)
    empty = Blocks()
    empty.names = ()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="pictures: there are none"):
        type(trainer)(trainer.model, empty, trainer.recipe, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: nothing in it is trained"):
        type(trainer)(trainer.model, Blocks(), trainer.recipe, tmp_path)
