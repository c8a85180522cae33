"""Evaluation: exact counts, records that survive a kill, shared images, and what the command prints."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.cli.eval import combine
from catseg_fast.data.folder import FolderDataset
from catseg_fast.engine.activations import record_activations
from catseg_fast.evaluation.ledger import Ledger
from catseg_fast.evaluation.metrics import ClassCounts
from catseg_fast.evaluation.report import check_target
from catseg_fast.evaluation.run import evaluate, model_segmenter, resize_shortest, summarise
from support.command_line import lines_of, run, save_tiny_checkpoint
from support.data_sets import add, make_dataset
from support.tiny import picture, tiny_model

IGNORE = 255


def random_maps(seed: int, classes: int, size: tuple[int, int] = (13, 17)) -> tuple[Tensor, Tensor]:
    """Labels and truth; some classes occur in one alone, some in neither, some pixels do not count."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.arange(0, classes, 2), size)
    truth = np.where(generator.random(size) < 0.4, labels, generator.integers(0, max(1, classes - 2), size))
    truth[generator.random(size) < 0.2] = IGNORE
    return torch.from_numpy(labels), torch.from_numpy(truth)


def slow_scores(pairs: list[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """The definitions, pixel by pixel."""
    sets: dict[str, list[set[tuple[int, int]]]] = {
        name: [set() for _ in range(classes)] for name in ("truth", "predicted")
    }
    for number, (labels, truth) in enumerate(pairs):
        for pixel, (label, right) in enumerate(
            zip(labels.flatten().tolist(), truth.flatten().tolist(), strict=True)
        ):
            if right != IGNORE:
                sets["truth"][right].add((number, pixel))
                sets["predicted"][label].add((number, pixel))
    both = list(zip(sets["truth"], sets["predicted"], strict=True))
    present, met = [(t, p) for t, p in both if t], [(t, p) for t, p in both if t | p]
    pixels = sum(len(t) for t, _ in both)
    return {
        "mIoU": sum(len(t & p) / len(t | p) for t, p in present) / len(present),
        "mIoU_union": sum(len(t & p) / len(t | p) for t, p in met) / len(met),
        "fwIoU": sum(len(t) / pixels * len(t & p) / len(t | p) for t, p in present),
        "pACC": sum(len(t & p) for t, p in both) / pixels,
        "mACC": sum(len(t & p) / len(t) for t, p in present) / len(present),
    }


@pytest.mark.parametrize("classes", [1, 5, 19])
def test_scores_are_those_of_a_slow_count(classes: int) -> None:
    pairs = [random_maps(seed, classes) for seed in range(3)]
    counts = ClassCounts.none(classes)
    for labels, truth in pairs:
        counts += ClassCounts.of(labels, truth, classes, IGNORE)
    assert counts.scores() == pytest.approx(slow_scores(pairs, classes), rel=1e-12)


def test_scores_are_those_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    classes = 19
    labels, truth = (
        torch.stack(maps) for maps in zip(*(random_maps(s, classes) for s in range(3)), strict=True)
    )
    counts = ClassCounts.of(labels.flatten(1), truth.flatten(1), classes, IGNORE)
    options: dict[str, Any] = {"num_classes": classes, "ignore_index": IGNORE}
    iou = functional.multiclass_jaccard_index(labels, truth, average="none", **options)
    met = counts.truth + counts.predicted > 0
    assert torch.allclose(counts.iou[met].float(), iou[met], atol=1e-6)
    accuracy = functional.multiclass_accuracy(labels, truth, average="none", **options)
    present = counts.truth > 0
    assert torch.allclose(counts.accuracy[present].float(), accuracy[present], atol=1e-6)
    micro = functional.multiclass_accuracy(labels, truth, average="micro", **options)
    assert counts.scores()["pACC"] == pytest.approx(micro.item(), abs=1e-6)
    weighted = functional.multiclass_jaccard_index(labels, truth, average="weighted", **options)
    assert counts.scores()["fwIoU"] == pytest.approx(weighted.item(), abs=1e-6)


def test_classes_that_no_picture_has_count_in_one_mean_alone() -> None:
    truth, labels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 3]])
    scores = ClassCounts.of(labels, truth, 5, IGNORE).scores()
    assert scores["mIoU"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["mIoU_union"] == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_counts_are_exact_beyond_what_floats_hold() -> None:
    big = ClassCounts(*(torch.tensor([2**53, 2**53]) for _ in range(3)))
    one = ClassCounts.of(*torch.zeros(2, 1, 1, dtype=torch.long), 2, IGNORE)
    assert (big + one).truth.tolist() == [2**53 + 1, 2**53]


def test_nothing_to_count() -> None:
    counts = ClassCounts.of(torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), IGNORE), 3, IGNORE)
    assert all(math.isnan(value) for value in counts.scores().values())


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"\[2, 3\] and their truth \[3, 2\]"),
        (torch.full((2, 2), 3), torch.zeros(2, 2, dtype=torch.long), "labels: 3 is not one of 3 classes"),
        (torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 7), "truth: 7 is not one of 3 classes or"),
    ],
)
def test_maps_that_do_not_fit(labels: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassCounts.of(labels, truth, 3, IGNORE)


@pytest.fixture
def data(tmp_path: Path) -> FolderDataset:
    """Seven pictures of different sizes, with three classes and pixels of none."""
    return write_data(tmp_path / "data", 7)


def write_data(root: Path, images: int, size: int = 20) -> FolderDataset:
    generator = np.random.default_rng(0)
    for index in range(images):
        labels = generator.choice([0, 1, 2, IGNORE], (size + index, size + 4)).astype(np.uint8)
        if index:
            add(root, f"{index}", labels)
        else:
            make_dataset(root, labels)
    return FolderDataset(root)


def by_brightness(image: Tensor) -> Tensor:
    """A segmenter of five classes."""
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
    """Images whose label map is gone, or was written by another evaluation, are done again."""
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
        with pytest.raises(FileExistsError, match=r"results\.json is there and is not of an evaluation"):
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
    monkeypatch.setattr(model, "label_map", lambda entries: taken.extend(entries) or model_answer(entries[0]))
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
    with torch.no_grad():  # the second linear layer's output is in the first block's and nowhere before
        model.aggregator.layers[1].swin_block.block_1.mlp.fc2.bias[3] += 1e6
    with record_activations(model.engine) as largest:
        model.segment(image, sliding_window=False)
    assert largest["layer 1, block 2"] == before["layer 1, block 2"]
    assert largest["layer 2, block 1"] == pytest.approx(1e6, rel=1e-3)
    assert "stages" not in vars(model.engine)


def test_combinations() -> None:
    names = [c.name for c in combine(["reference", "torch"], ["float32"], ["float32", "float16"])]
    assert names == ["reference-float32", "torch-float32-float32", "torch-float32-float16"]
    assert [c.name for c in combine(["auto"], ["float32"], None)] == ["auto-float32"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures in `data` and a checkpoint, `tiny.pth`."""
    root = tmp_path_factory.mktemp("small")
    write_data(root / "data", 2)
    save_tiny_checkpoint(root)
    return root


def test_the_command(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    options = ["--data", small / "data", "--weights", small / "tiny.pth", "--whole", "--output", out]
    result = run(
        "eval", *options, "--backend", "reference", "--backend", "torch", "--activations", "--top", 1
    )
    assert result.exit_code == 0, result.output
    for text in (
        "reference-float32",
        "torch-float32",
        "layer 1, classes, apply",
        "house, home",
        "2 images; wrote",
    ):
        assert text in result.stdout
    found = json.loads((out / "results.json").read_text())
    reference, engine = found["results"]
    assert [reference["runs_on"], engine["runs_on"]] == ["reference", "torch"]
    assert reference["label_agreement"] is None
    assert engine["label_agreement"] >= 0.999
    assert engine["mIoU"] == pytest.approx(reference["mIoU"], abs=1e-3)
    assert engine["activations"]["decode"] > 0
    assert reference["activations"] == {}
    assert found["environment"]["torch"] == torch.__version__
    assert len(reference["weights_sha256"]) == 64

    model = CATSeg.from_pretrained(small / "tiny.pth", found["classes"], device="cpu", backend="reference")
    pairs = []
    for entry in FolderDataset(small / "data"):
        labels = model.segment(entry["image"], sliding_window=False).labels
        saved = np.array(Image.open(out / "reference-float32.labels" / f"{entry['name']}.png"))
        assert np.array_equal(labels, saved)
        pairs.append((labels, entry["sem_seg"]))
    slow = slow_scores(pairs, 3)
    assert {key: reference[key] for key in slow} == pytest.approx(slow, rel=1e-12)

    monkeypatch.setattr(CATSeg, "segment", None)  # nothing is left to do
    again = run("eval", *options, "--backend", "reference", "--backend", "torch", "--activations")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "results.json").read_text()) == found

    other = run("eval", *options, "--backend", "reference")
    assert other.exit_code == 1
    assert "is of another evaluation: activations was True and is False" in other.stderr


def test_more_classes_than_the_data_set_s(small: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("heaven\noak\nhut\nsea\n")
    options = ["--data", small / "data", "--weights", small / "tiny.pth", "--whole", "--limit", 1]
    files = ["--classes-file", tmp_path / "names.txt", "--output", tmp_path / "out"]
    result = run("eval", *options, *files)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["name"] for row in found["classes"]] == ["heaven", "oak", "hut", "sea"]
    assert found["classes"][3]["truth"] == 0
    assert found["images"] == 1


def test_bad_input_gets_a_line(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "few.txt").write_text("sky\n")
    damaged = write_data(tmp_path / "damaged", 1).root
    Image.fromarray(np.full((20, 24), 9, dtype=np.uint8)).save(damaged / "annotations" / "a.png")
    weights = ["--weights", small / "tiny.pth", "--whole"]
    cases = [
        (["--data", tmp_path / "none"], 1, "none/classes.json: no such file"),
        (["--data", small / "data", "--output", tmp_path / "file"], 2, "is not a folder"),
        (["--data", small / "data", "--output", tmp_path / "file" / "out", *weights], 1, "Not a directory"),
        (["--data", small / "data", "--classes-file", tmp_path / "few.txt"], 1, "1 classes are fewer than"),
        (["--data", small / "data", "--backend", "fast"], 2, "'fast' is not one of"),
        (["--data", small / "data", "--weights", tmp_path / "w.pth"], 1, "w.pth"),
        (["--data", damaged, "--output", tmp_path / "out", *weights], 1, "a.png: the annotation has index 9"),
    ]
    for options, code, message in cases:
        if "--output" not in options:
            options = [*options, "--output", tmp_path / "out"]
        result = run("eval", *options)
        assert result.exit_code == code, (options, result.output)
        assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
        assert "Traceback" not in result.output
        if code == 1:
            assert lines_of(result.stderr)[-1].startswith("error:")
