"""A Ray dataset of pictures, on a Ray cluster of this machine, against a plain loop."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast import CATSeg, Segmentation
from catseg_fast.output.results import summarise
from support.documents import ROOT, blocks
from support.tiny import CLASSES, V2, picture, tiny_model

ray = pytest.importorskip("ray", reason="Ray is not installed: it is in the extra 'ray'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: it is in the extra 'ray'")

from catseg_fast.ray import _Segmenter, segment_dataset  # noqa: E402

OPTIONS: dict[str, Any] = {"variant": V2, "sliding_window": False, "device": "cpu"}
pytestmark = pytest.mark.xdist_group("processes")  # so that no more of them run at a time than necessary


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs, which ends with the tests."""
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"model": tiny_model().state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(4):
        image = picture(20 + 3 * index, 30, f"{index}").byte()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def load(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["labels"])))


def same_labels(labels: np.ndarray, best: Segmentation) -> bool:
    """Check whether labels agree except for ties: an actor has fewer threads, and can round differently."""
    assert best.top_scores is not None
    first, second = best.top_scores[:2]
    return bool((first - second < 1e-5)[torch.from_numpy(labels) != best.labels].all())


def entries(rows: Any) -> list[tuple[Any, ...]]:
    """Return a summary without its mean scores."""
    return [(entry["index"], entry["name"], entry["share"]) for entry in rows if entry["share"]]


@pytest.mark.usefixtures("cluster")
def test_pictures_by_path_come_as_from_the_plain_loop(weights: Path, photos: list[Path]) -> None:
    bad = photos[0].with_name("bad.png")
    bad.write_bytes(b"no picture")
    ds = ray.data.from_items([{"path": str(path), "id": n} for n, path in enumerate([*photos, bad])])
    ds = segment_dataset(ds, str(weights), CLASSES, on_error="record", **OPTIONS)
    *rows, refused = sorted(ds.take_all(), key=lambda row: row["id"])

    model = CATSeg.from_pretrained(weights, CLASSES, variant=V2, device="cpu")
    for row, path in zip(rows, photos, strict=True):
        segmentation = model.segment(path, sliding_window=False, top_k=2)
        assert row.keys() == {"path", "id", "labels", "mean_score", "classes", "error"}
        assert (row["path"], row["error"]) == (str(path), None)
        labels = load(row).astype(np.int32)
        assert same_labels(labels, segmentation)
        assert row["mean_score"] == pytest.approx(segmentation.scores.mean().item(), abs=1e-6)
        summary = summarise(replace(segmentation, labels=torch.from_numpy(labels)))
        assert entries(row["classes"]) == entries(summary)
        for entry in row["classes"]:
            assert entry["mean_score"] == pytest.approx(summary[entry["index"]]["mean_score"], abs=1e-6)
    assert (refused["labels"], refused["mean_score"], refused["classes"]) == (None, None, None)
    assert re.search(r"cannot read '.*bad\.png'", refused["error"])


@pytest.mark.usefixtures("cluster")
def test_the_guides_code(weights: Path, photos: list[Path], tmp_path: Path) -> None:
    (code,) = (code for _, code in blocks(ROOT / "docs" / "guide" / "programs.md") if "import ray" in code)
    code = code.replace('"v2-vitl"', repr(str(weights))).replace("actors=4", "actors=1, variant=V2")
    code = code.replace('"segmented"', repr(str(tmp_path / "segmented")))  # actors have a folder of their own
    names: dict[str, Any] = {"V2": V2}
    exec(compile(code, "programs.md", "exec"), names)
    names["segment_all"]([str(path) for path in photos])
    rows = ray.data.read_parquet(str(tmp_path / "segmented")).take_all()
    assert len(rows) == len(photos)
    assert load(rows[0]).ndim == 2


@pytest.mark.usefixtures("cluster")
def test_arrays_of_several_sizes(weights: Path, photos: list[Path]) -> None:
    images = [np.asarray(Image.open(path)) for path in photos]
    ds = ray.data.from_items([{"image": image, "id": n} for n, image in enumerate(images)])
    ds = segment_dataset(ds, str(weights), CLASSES, labels="array", **OPTIONS)
    model = CATSeg.from_pretrained(weights, CLASSES, variant=V2, device="cpu")
    rows = sorted(ds.take_all(), key=lambda row: row["id"])
    for row, image in zip(rows, images, strict=True):
        assert row.keys() == {"id", "labels", "mean_score", "classes"}
        assert same_labels(
            row["labels"].astype(np.int32), model.segment(image, sliding_window=False, top_k=2)
        )


def test_an_actor_takes_bytes_and_columns_of_other_names(photos: list[Path]) -> None:
    model, path = tiny_model(), photos[0]
    expected = model.segment(path, sliding_window=False).labels.numpy()
    for column, row in ((None, {"bytes": path.read_bytes()}), ("photo", {"photo": path.read_bytes()})):
        actor = _Segmenter(lambda: model, CLASSES, {}, column, "array", "raise", False)
        assert np.array_equal(actor(row)["labels"], expected)
    threshold = model.segment(path, sliding_window=False).scores.median().item()
    least = _Segmenter(lambda: model, CLASSES, {}, None, "array", "raise", False, threshold)
    row = least({"path": str(path)})
    assert 0 < (row["labels"] == -1).sum() < expected.size
    assert row["classes"][-1]["index"] == -1
    with pytest.raises(ValueError, match="column: a row has id, not image or bytes or path"):
        _Segmenter(lambda: model, None, {}, None, "png", "record", False)({"id": 1})
    with pytest.raises(ValueError, match="photo: cannot read the 10 bytes: not a picture"):
        actor({"photo": b"no picture"})


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "jpeg"}, "labels: 'jpeg' is not one of png, array"),
        ({"on_error": "ignore"}, "on_error: 'ignore' is not one of raise, record"),
        ({"actors": 0}, "actors: 0 is not positive"),
        ({"min_score": 2}, "min_score: expected a probability in 0..1, got 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_dataset(ray.data.from_items([{"path": "a"}]), "weights", CLASSES, **arguments)


@pytest.mark.usefixtures("cluster")
def test_a_function_takes_no_options() -> None:
    with pytest.raises(TypeError, match="device: is for from_pretrained"):
        segment_dataset(ray.data.from_items([{"path": "a"}]), tiny_model, device="cpu")
