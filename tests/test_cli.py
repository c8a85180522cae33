"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg, __version__
from catseg_fast.config import VARIANTS
from catseg_fast.inference.images import load_image
from catseg_fast.model import Segmentation
from catseg_fast.output.ownership import unique_stems
from catseg_fast.output.results import save_segmentation, summarise
from catseg_fast.text.class_lists import EVERYDAY_CLASSES, parse_classes, read_classes
from support.command_line import TINY, draw_photo, lines_of, outputs, run, written


@pytest.mark.parametrize("path", ["--sliding-window", "--whole"])
def test_segment_writes_what_the_model_says(workplace, weights, path):
    result = run("segment", "photo.png", "--classes", "sky; tree ;person, man", "--weights", weights, path)
    assert result.exit_code == 0, result.stderr
    folder = workplace / "segmented"
    assert written(folder) == outputs("photo")

    model = CATSeg.from_pretrained(weights, ["sky", "tree", "person, man"], device="cpu")
    expected = model.segment("photo.png", sliding_window=path == "--sliding-window")
    with Image.open(folder / "photo.labels.png") as labels:
        assert labels.mode == "I;16"
        assert np.array_equal(np.array(labels), expected.labels.numpy())
    with Image.open(folder / "photo.overlay.png") as picture:
        picture.load()
        assert picture.mode == "RGB"
    content = json.loads((folder / "photo.json").read_text())
    assert len(content.pop("fingerprint")) == 32
    assert content.pop("identity").keys() == {"path", "content", "files"}
    assert content == {
        "image": "photo.png",
        "variant": model.variant.name,
        "weights": str(weights),
        "catseg_fast": __version__,
        "width": 40,
        "height": 30,
        "classes": [entry for entry in summarise(expected) if entry["share"]],
    }
    largest = max(content["classes"], key=lambda entry: entry["share"])
    assert f"{largest['name'].partition(',')[0]} {largest['share']:.0%}" in result.stdout
    assert "photo.overlay.png" in result.stdout
    assert lines_of(result.stderr) == []


def test_summary():
    labels, scores = torch.tensor([[0, 0, 2, 0]]), torch.tensor([[0.5, 0.25, 0.75, 0.75]])
    assert summarise(Segmentation(labels.int(), scores, ("a", "b", "c"))) == [
        {"index": 0, "name": "a", "share": 0.75, "mean_score": 0.5},
        {"index": 1, "name": "b", "share": 0.0, "mean_score": None},
        {"index": 2, "name": "c", "share": 0.25, "mean_score": 0.75},
    ]


def test_one_bad_image_among_many(workplace, weights):
    draw_photo(workplace / "more" / "photo.png", seed=1)
    (workplace / "half[1].png").write_bytes((workplace / "photo.png").read_bytes()[:200])
    images = ["photo.png", "half[1].png", "none.jpg", "more/photo.png"]
    result = run("segment", *images, "--weights", weights, "-o", "out")
    assert result.exit_code == 1
    assert written(workplace / "out") == outputs("photo", "photo-2")
    lines = lines_of(result.stderr)
    assert lines[0].startswith("error: image: cannot read 'half[1].png': ")
    assert lines[1:] == ["error: image: no such file: 'none.jpg'", "2 of 4 images failed"]
    assert json.loads((workplace / "out" / "photo-2.json").read_text())["image"] == "more/photo.png"


BUG = (
    "This is a bug in catseg-fast. Please report it with the output of the same command with --debug, and of "
    "`catseg-fast env`.",
)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (MemoryError(), ["error: photo.png: out of memory"]),
        (MemoryError("Unable to allocate"), ["error: photo.png: out of memory: Unable to allocate"]),
        (torch.OutOfMemoryError("CUDA out of memory."), ["error: photo.png: CUDA out of memory."]),
        (torch.OutOfMemoryError("2 GiB"), ["error: photo.png: out of memory: 2 GiB"]),
        *(
            (
                kind("list index out of range"),
                [f"error: photo.png: {kind.__name__}: list index out of range", *BUG],
            )
            for kind in (IndexError, ValueError, TypeError, RuntimeError)
        ),
    ],
)
def test_an_error_of_the_model_names_the_image(workplace, weights, monkeypatch, error, lines):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(CATSeg, "segment", fail)
    result = run("segment", "photo.png", "--weights", weights)
    assert result.exit_code == 1
    assert lines_of(result.stderr) == [*lines, "1 of 1 images failed"]
    assert not (workplace / "segmented").exists()


def test_a_bug_keeps_its_traceback_with_debug(workplace, weights, monkeypatch):
    def fail(*_, **__):
        raise IndexError("list index out of range")

    monkeypatch.setattr(CATSeg, "segment", fail)
    result = run("segment", "photo.png", "--weights", weights, "--debug")
    assert isinstance(result.exception, IndexError)


def test_a_variant_without_weights_is_untrained(workplace, monkeypatch):
    monkeypatch.setitem(VARIANTS, "v2-vitb", TINY)
    labels = []
    for seed in (3, 3, 4):
        options = ("--variant", "v2-vitb", "--whole", "--seed", seed)
        result = run("segment", "photo.png", "--classes", "sky; tree; sea", *options)
        assert result.exit_code == 0, result.stderr
        assert "untrained" in result.stderr
        assert "labels mean nothing" in result.stderr
        labels.append((workplace / "segmented" / "photo.labels.png").read_bytes())
    assert labels[0] == labels[1] != labels[2]
    assert json.loads((workplace / "segmented" / "photo.json").read_text())["weights"] is None


def test_default_classes(workplace, weights):
    assert run("segment", "photo.png", "--weights", weights, "--whole").exit_code == 0
    content = json.loads((workplace / "segmented" / "photo.json").read_text())
    assert all(EVERYDAY_CLASSES[entry["index"]] == entry["name"] for entry in content["classes"])
    assert 0 < len(content["classes"]) < len(EVERYDAY_CLASSES)  # those that occur


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_reaches_the_model(workplace, weights, dtype, monkeypatch):
    seen = []
    segment = CATSeg.segment

    def spy(self, image):
        seen.append(self.aggregator.conv1.weight.dtype)
        return segment(self, image)

    monkeypatch.setattr(CATSeg, "segment", spy)
    result = run("segment", "photo.png", "--weights", weights, "--whole", "--dtype", dtype, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert seen == [getattr(torch, dtype)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", " ; "], "no class names"),
        (["--classes", ""], "--classes: the value is empty"),
        (["--output", ""], "--output: the value is empty; is a shell variable unset?"),
        (["--output="], "--output: the value is empty"),
        ([""], "argument 2: the value is empty"),
        (["--", ""], "argument 3: the value is empty"),
        (["--classes", "a", "--classes-file", "names.txt"], "not both"),
        (["--classes", "a", "--classes-list", "ade-150"], "not both"),
        (["--classes-list", "ade-151"], "lvis-1203"),
        (["--stats", "table.csv"], "expected a .parquet or a .json file"),
        (["--classes-file", "none.txt"], "none.txt"),
        (["--classes-file", "photo.png"], ".txt or a .json file"),
        (["--dtype", "float8"], "float32, float16, bfloat16"),
        (["--variant", "v3"], "v2-vitl"),
        (["--backend", "cuda"], "triton"),
        (["--alpha", "1.5"], "--alpha"),
        (["--output", "photo.png"], "photo.png is not a folder"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors(workplace, arguments, message):
    (workplace / "names.txt").write_text("a\n")
    before = written(workplace)
    result = run("segment", "photo.png", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert written(workplace) == before


def test_no_image_is_a_usage_error(workplace):
    assert run("segment").exit_code == 2
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "none.pth"], "none.pth"),
        (["--weights", "photo.png"], "photo.png"),
        (["--weights", "WEIGHTS", "--variant", "v2-vitb"], "v2-vitb"),
        (["--weights", "WEIGHTS", "--classes", "sky; sky"], "'sky'"),
        (["--weights", "WEIGHTS", "--classes", "very " * 90], "77"),
        (["--weights", "WEIGHTS", "--device", "nonsense"], "--device: 'nonsense' is not available"),
    ],
)
def test_user_errors_are_one_message(workplace, weights, arguments, message):
    arguments = [str(weights) if argument == "WEIGHTS" else argument for argument in arguments]
    before = written(workplace)
    result = run("segment", "photo.png", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert written(workplace) == before

    debugged = run("segment", "photo.png", *arguments, "--debug")
    assert debugged.exit_code == 1
    assert isinstance(debugged.exception, ValueError | OSError | RuntimeError)


def test_a_failing_write_leaves_nothing_behind(workplace, weights, monkeypatch):
    def disk_full(labels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("catseg_fast.output.results.label_png", disk_full)
    result = run("segment", "photo.png", "--weights", weights, "--whole")
    assert result.exit_code == 1
    assert "photo.png: [Errno 28] No space left" in result.stderr
    assert written(workplace / "segmented") == set()


def test_results_replace_older_ones(tmp_path):
    image = torch.zeros(3, 2, 2)
    for label in (0, 1):
        segmentation = Segmentation(torch.full((2, 2), label).int(), torch.ones(2, 2), ("a", "b"))
        save_segmentation(tmp_path, "x", image, segmentation, {})
        with Image.open(tmp_path / "x.labels.png") as labels:
            assert np.unique(np.array(labels)).tolist() == [label]
    assert written(tmp_path) == outputs("x")


def test_interrupt_ends_with_130_and_keeps_what_is_done(workplace, weights, monkeypatch):
    draw_photo(workplace / "second.png")
    segment, calls = CATSeg.segment, []

    def interrupted(self, image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segment(self, image)

    monkeypatch.setattr(CATSeg, "segment", interrupted)
    result = run("segment", "photo.png", "second.png", "--weights", weights, "--whole")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert written(workplace / "segmented") == outputs("photo")


def test_unique_stems():
    paths = ["a/x.jpg", "b/x.png", "x-2.jpg", "X.gif", "y.tar.gz", "x.jpg"]
    assert unique_stems(map(Path, paths)) == ["x", "x-3", "x-2", "X-4", "y.tar", "x-5"]


def test_nearly_black_pictures_are_segmented(workplace, weights):
    Image.new("RGB", (1, 1), (1, 1, 1)).save("dark.png")
    result = run("segment", "dark.png", "--weights", weights)
    assert result.exit_code == 0, result.stderr
    assert load_image("segmented/dark.labels.png").shape == (3, 1, 1)


def test_parse_classes_and_the_note_on_a_lone_comma_list(workplace, weights):
    assert parse_classes("sky; person, man;;  tree ") == ["sky", "person, man", "tree"]
    result = run("segment", "photo.png", "--classes", "sky, tree, sea", "--weights", weights, "--whole")
    assert result.exit_code == 0
    assert "one class with 3 synonyms; semicolons separate classes" in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "sky\r\n\r\n  straße, road \r\ntree"),
        ("names.txt", "\ufeffsky\nstraße, road\ntree\n"),
        ("names.JSON", '["sky", "straße, road", "tree"]'),
    ],
)
def test_class_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_classes(path) == ["sky", "straße, road", "tree"]


def test_a_class_file_with_several_names_of_a_class(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('{"sky": "sky", "background": ["wall", "floor, ground"]}')
    assert read_classes(path) == {"sky": ["sky"], "background": ["wall", "floor, ground"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", b"\n \n", "has no class names"),
        ("names.json", b"[]", "has no class names"),
        ("names.json", b'["sky", 3]', "expected a JSON list of strings"),
        ("names.json", b"3", "expected a JSON list of strings, or an object with lists of them"),
        ("names.json", b'{"sky": 0}', "'sky' has 0; expected its name or a list of its names"),
        ("names.json", b'{"sky": []}', "'sky' has no names"),
        ("names.json", b'{"sky": ["air"], "tree": ["oak", "air"]}', "'air' is a name of 'sky' and of 'tree'"),
        ("names.json", b"[" * 100_000, "is not JSON"),
        ("names.json", b"sky\n", "is not JSON"),
        ("names.txt", b"stra\xdfe", "is not UTF-8 text"),
        ("names.csv", b"sky", r"expected a \.txt or a \.json file"),
    ],
)
def test_bad_class_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"names\.\w+.* ?{message}"):
        read_classes(path)


def test_convert(workplace, weights):
    result = run("convert", weights, "tiny.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "is custom-v2-vit64x9; wrote tiny.safetensors" in result.stdout
    assert run("segment", "photo.png", "--weights", "tiny.safetensors", "--whole").exit_code == 0
    failed = run("convert", weights, "tiny.bin")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: target: ")
    assert "tiny.bin" not in written(workplace)


def test_env_names_versions_devices_and_backend():
    result = run("env")
    assert result.exit_code == 0
    report = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert report["catseg-fast"] == __version__
    assert report["torch"] == torch.__version__
    assert report["backend"] in ("triton", "torch", "reference")
    assert {"python", "triton", "open_clip", "timm", "CUDA", "GPU", "CPU", "OS"} <= {
        "GPU" if name.startswith("GPU") else name for name in report
    }


def test_variants_lists_them_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("variants")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in VARIANTS)


def test_version():
    assert run("--version").stdout == f"catseg-fast {__version__}\n"


COMMANDS = (
    "app",
    "convert",
    "dataset",
    "env",
    "eval",
    "scenes",
    "segment",
    "train",
    "tune",
    "variants",
    "warmup",
)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert " ".join(["catseg-fast", *command]) in result.stdout


def test_as_a_module_in_a_process_of_its_own(workplace, weights):
    command = [sys.executable, "-m", "catseg_fast", "segment", "photo.png", "none.png", "--weights", weights]
    done = subprocess.run([*command, "--whole"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert lines_of(done.stderr) == ["error: image: no such file: 'none.png'", "1 of 2 images failed"]
    assert "photo.overlay.png" in done.stdout
    assert written(workplace / "segmented") == outputs("photo")
