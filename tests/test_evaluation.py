"""Evaluation: exact counts, records that survive a kill, shared images, and what the command prints."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catseg_fast.data.folder import FolderDataset
from catseg_fast.engine.activations import record_activations
from catseg_fast.evaluation.ledger import Ledger
from catseg_fast.evaluation.report import check_target
from catseg_fast.evaluation.run import evaluate, model_segmenter, resize_shortest, summarise
from catseg_fast.text.class_lists import ready_list
from catseg_fast.text.fold import Fold
from support.data_sets import write_data
from support.scores import IGNORE, slow_scores
from support.tiny import picture, tiny_model


@pytest.fixture
def data(tmp_path: Path) -> FolderDataset:
    """Seven pictures of different sizes, with three classes and pixels of none."""
    return write_data(tmp_path / "data", 7)


def by_brightness(image: Tensor) -> Tensor:
    """Segment into five classes."""
    return image.float().mean(dim=0).div(51.2).long()


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_any_function_can_be_evaluated(data: FolderDataset) -> None:
    steps: list[tuple[int, int]] = []
    records = evaluate(data, by_brightness, 5, advance=lambda *step: steps.append(step))
    assert steps == [(done, 7) for done in range(8)]
    found = summarise(records, 5)
    pairs = [(by_brightness(entry["image"]), entry["sem_seg"]) for entry in data]
    assert found.counts.scores() == pytest.approx(slow_scores(pairs, 5), rel=1e-12)
    assert found.images == 7
    assert found.agreement is None
    assert summarise(evaluate(data, by_brightness, 5, limit=3), 5).images == 3


def test_fewer_classes_than_the_data_set_s(data: FolderDataset) -> None:
    with pytest.raises(ValueError, match="classes: 2 are fewer than the data set's 3"):
        evaluate(data, by_brightness, 2)


def test_agreement_counts_every_pixel(data: FolderDataset, tmp_path: Path) -> None:
    evaluate(data, by_brightness, 5, save_labels=tmp_path / "labels")

    def other(image: Tensor) -> Tensor:
        labels = by_brightness(image)
        labels[0, :4] = (labels[0, :4] + 1) % 5
        return labels

    found = summarise(evaluate(data, other, 5, compare_labels=tmp_path / "labels"), 5)
    pixels = sum(entry["sem_seg"].numel() for entry in data)
    assert found.agreement == 1 - 7 * 4 / pixels


def test_another_evaluation_is_not_gone_on_with(data: FolderDataset, tmp_path: Path) -> None:
    evaluate(data, by_brightness, 5, ledger=Ledger(tmp_path, "run", {"weights": "a" * 64, "classes": ["x"]}))
    other = Ledger(tmp_path, "run", {"weights": "b", "classes": ["x"]})
    with pytest.raises(
        ValueError, match=r"run\.0\.jsonl is of another evaluation: weights was 'aaa.* is 'b'"
    ):
        evaluate(data, by_brightness, 5, ledger=other)
    other.clear()
    assert len(evaluate(data, by_brightness, 5, ledger=other)) == 7


@pytest.mark.parametrize("change", ["missing", "other"])
def test_records_go_with_their_label_maps(data: FolderDataset, tmp_path: Path, change: str) -> None:
    """Images whose label map is missing, or was written by another evaluation, are evaluated again."""
    labels, seen = tmp_path / "labels", []

    def counting(image: Tensor) -> Tensor:
        seen.append(image)
        return by_brightness(image)

    def both() -> list[Any]:
        seen.clear()
        first = evaluate(data, counting, 5, ledger=Ledger(tmp_path, "a", {}), save_labels=labels)
        second = evaluate(data, counting, 5, ledger=Ledger(tmp_path, "b", {}), compare_labels=labels)
        return [without_times(first), without_times(second)]

    whole = both()
    assert len(seen) == 14
    assert both() == whole
    assert len(seen) == 0
    path = labels / f"{data.names[0]}.png"
    path.unlink()
    if change == "other":
        Image.fromarray(np.full(data[0]["sem_seg"].shape, 4, np.uint16)).save(path)
    assert both() == whole
    assert len(seen) == 1
    Image.fromarray(np.full(data[0]["sem_seg"].shape, 4, np.uint16)).save(path)
    evaluate(data, counting, 5, ledger=Ledger(tmp_path, "b", {}), compare_labels=labels)
    assert len(seen) == 2


def test_results_of_others_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    check_target(path)
    for content in ('{"results": 1}', "[]", "no JSON"):
        path.write_text(content)
        with pytest.raises(FileExistsError, match=r"results\.json exists and is not of an evaluation"):
            check_target(path)


def test_half_a_line_is_done_again(data: FolderDataset, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "run", {})
    whole = evaluate(data, by_brightness, 5, ledger=ledger)
    path = tmp_path / "run.0.jsonl"
    content = path.read_bytes()
    seen: list[Tensor] = []

    def counting(image: Tensor) -> Tensor:
        seen.append(image)
        return by_brightness(image)

    for cut in (5, len(content.splitlines(keepends=True)[-1]) + 3):
        path.write_bytes(content[:-cut])
        seen.clear()
        again = evaluate(data, counting, 5, ledger=Ledger(tmp_path, "run", {}))
        assert without_times(again) == without_times(whole)
        assert len(seen) == (1 if cut == 5 else 2)
        assert len(path.read_text().splitlines()) == 8
    path.write_bytes(content[:1])  # killed in the first line
    assert without_times(evaluate(data, by_brightness, 5, ledger=ledger)) == without_times(whole)
    path.write_text("{}\nnonsense\n")
    with pytest.raises(ValueError, match=r"run\.0\.jsonl is damaged"):
        evaluate(data, by_brightness, 5, ledger=ledger)


SCRIPT = """
import sys, time
from pathlib import Path
from catseg_fast.data.folder import FolderDataset
from catseg_fast.evaluation.run import evaluate
from catseg_fast.evaluation.ledger import Ledger
from catseg_fast.distributed.torchrun import join

def by_brightness(image):
    time.sleep(float(sys.argv[3]))
    return image.float().mean(dim=0).div(51.2).long()

with join("cpu", objects=True) as processes:
    ledger = Ledger(Path(sys.argv[2]), "run", {"a": 1})
    evaluate(FolderDataset(sys.argv[1]), by_brightness, 5, ledger=ledger, processes=processes)
"""


def start(command: list[str], data: FolderDataset, output: Path, seconds: float) -> subprocess.Popen[bytes]:
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*command, str(script), str(data.root), str(output), str(seconds)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)


def test_killed_and_resumed_equals_uninterrupted(data: FolderDataset, tmp_path: Path) -> None:
    process = start([sys.executable], data, tmp_path / "out", 0.4)
    ledger_file = tmp_path / "out" / "run.0.jsonl"
    while not ledger_file.exists() or len(ledger_file.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(ledger_file.read_text().splitlines()) < 8
    resumed = evaluate(data, by_brightness, 5, ledger=Ledger(tmp_path / "out", "run", {"a": 1}))
    assert without_times(resumed) == without_times(evaluate(data, by_brightness, 5))
    assert len(ledger_file.read_text().splitlines()) == 8


def test_two_processes_equal_one(data: FolderDataset, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(torchrun, data, tmp_path / "out", 0)
    assert process.wait() == 0
    files = sorted((tmp_path / "out").glob("[!.]*"))
    assert [(file.name, len(file.read_text().splitlines()) - 1) for file in files] == [
        ("run.0.jsonl", 4),
        ("run.1.jsonl", 3),
    ]

    def never(image: Tensor) -> Tensor:
        raise AssertionError("everything is done")

    shared = evaluate(data, never, 5, ledger=Ledger(tmp_path / "out", "run", {"a": 1}))
    assert without_times(shared) == without_times(evaluate(data, by_brightness, 5))


def test_a_model_is_evaluated_as_upstream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny_model(), picture(20, 31).byte()
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(
        model, "label_map", lambda entries, **_: taken.extend(entries) or model_answer(entries[0])
    )
    model.sliding_window = True
    model_segmenter(model)(image)
    assert (taken[0]["height"], taken[0]["width"]) == (20, 31)
    assert torch.equal(taken[0]["image"], resize_shortest(image))
    model.sliding_window = False
    assert torch.equal(model_segmenter(model)(image), model.segment(image).labels)


def model_answer(entry: dict[str, Any]) -> list[Any]:
    class Answer:
        labels = torch.zeros(entry["height"], entry["width"])

    return [Answer]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (640, 853)),
        ((640, 480), (853, 640)),
        ((100, 1000), (256, 2560)),
        ((640, 640), (640, 640)),
    ],
)
def test_resize_shortest(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = picture(*size).byte()
    resized = resize_shortest(image)
    assert resized.shape == (3, *expected)
    assert resized.dtype == torch.uint8
    if size == expected:
        assert torch.equal(resized, image)


def test_largest_values_of_the_stages() -> None:
    model = tiny_model(backend="torch")
    image = picture(96, 96)
    plain = model.segment(image, sliding_window=False)
    with record_activations(model.engine) as largest:
        watched = model.segment(image, sliding_window=False)
    assert torch.equal(watched.scores, plain.scores)
    stages = {key for key in largest if key.startswith("layer 2")}
    assert stages == {
        "layer 2, block 1", "layer 2, block 2", "layer 2, classes, collect", "layer 2, classes, apply",
    }  # fmt: skip
    assert "decode" in largest
    assert all(0 < value < math.inf for value in largest.values())

    before = dict(largest)
    with torch.no_grad():  # the second linear layer's output first appears in that of the first block
        model.aggregator.layers[1].swin_block.block_1.mlp.fc2.bias[3] += 1e6
    with record_activations(model.engine) as largest:
        model.segment(image, sliding_window=False)
    assert largest["layer 1, block 2"] == before["layer 1, block 2"]
    assert largest["layer 2, block 1"] == pytest.approx(1e6, rel=1e-3)
    assert "stages" not in vars(model.engine)


def test_unlabelled_pixels_in_a_data_set(data: FolderDataset, tmp_path: Path) -> None:
    def cautious(image: Tensor) -> Tensor:
        labels = by_brightness(image)
        return labels.where(torch.arange(labels.shape[1]) >= 4, -1)

    pairs = [(cautious(entry["image"]), entry["sem_seg"]) for entry in data]
    counted = [(labels[truth != IGNORE], truth[truth != IGNORE]) for labels, truth in pairs]
    none = sum(int((labels == -1).sum()) for labels, _ in counted)
    every = sum(len(labels) for labels, _ in counted)
    found = summarise(evaluate(data, cautious, 5, save_labels=tmp_path), 5)
    right = sum(int((labels == truth).sum()) for labels, truth in counted)
    assert found.unlabelled == none / every
    assert found.counts.scores()["pACC"] == right / every
    saved = np.array(Image.open(tmp_path / f"{data.names[0]}.png"))
    assert np.array_equal(saved, pairs[0][0].numpy().astype(np.uint16))  # 65535
    again = evaluate(data, cautious, 5, ignore_unlabelled=True, compare_labels=tmp_path)
    found = summarise(again, 5, ignore_unlabelled=True)
    assert found.unlabelled == none / every
    assert found.counts.scores()["pACC"] == right / (every - none)
    assert found.agreement == 1


def test_many_labels_of_one_class_as_upstreams_pascal_voc_with_background() -> None:
    """Upstream's VOCbEvaluator: predictions of index 20 and above are the background, class 20."""
    generator = torch.Generator().manual_seed(0)
    labels, truth = torch.randint(0, 59, (40, 50), generator=generator), torch.full((40, 50), 20)
    truth[:20] = torch.randint(0, 21, (20, 50), generator=generator)
    truth[:, :3] = IGNORE
    folded = labels.where(labels < 20, 20)
    expected = slow_scores([(folded, truth)], 21)
    names = ready_list("pas-20b").classes
    assert isinstance(names, dict)
    fold = Fold.of(names)
    assert (len(fold.classes), len(fold.names)) == (21, 59)

    class Data:
        classes, ignore_label, names = fold.classes, IGNORE, ("a",)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"name": "a", "image": torch.zeros(3, 40, 50), "sem_seg": truth}

    records = evaluate(Data(), lambda image: labels, fold=fold.owners)
    assert summarise(records, 21).counts.scores() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="fold: label 20 goes to class 21, and there are 21 classes"):
        evaluate(Data(), lambda image: labels, fold=[*range(20), 21])
    with pytest.raises(ValueError, match="fold: it is empty; give the class of each label"):
        evaluate(Data(), lambda image: labels, fold=[])
    with pytest.raises(ValueError, match="labels: 58 is not one of 58 classes"):
        evaluate(Data(), lambda image: labels.clamp(min=58), fold=fold.owners[:-1])


@torch.no_grad()
def test_stages_whose_launches_are_prepared_together_are_recorded_one_by_one() -> None:
    model = tiny_model(backend="torch")
    stages = model.engine.stages(model.engine.plan())
    together = SimpleNamespace(**vars(stages))  # functions of a module
    together.repeats, together.as_one = True, lambda *_: pytest.fail("stages are called together")
    with (
        mock.patch.object(type(model.engine), "stages", return_value=together),
        record_activations(model.engine) as largest,
    ):
        model.segment(picture(24, 36), sliding_window=False)
    assert {"embed_cost_volume", "decode"} <= largest.keys()
