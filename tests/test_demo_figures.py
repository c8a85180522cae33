"""The figures of the bundled model in the documents are those of `examples/demo_model/results/`."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from catseg_fast import CATSeg
from catseg_fast.weights import weights_hash
from support.documents import ROOT

RESULTS = ROOT / "examples" / "demo_model" / "results"
PAGE = (ROOT / "docs" / "guide" / "evaluation.md").read_text(encoding="utf-8")
ROWS = {
    "held-out": "bundled model, 20 classes",
    "synonyms": "the same, named only by synonyms",
    "held-out-200": "the same among 200 classes, 180 of which are absent",
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


@pytest.fixture(scope="module")
def bundled() -> str:
    """The hash of the bundled weights, as evaluations record it."""
    return weights_hash(CATSeg.from_pretrained("demo", device="cpu").state_dict())


@pytest.mark.parametrize("name", ROWS)
def test_miou_of_the_bundled_weights(name: str, bundled: str) -> None:
    (result,) = load(name)["results"]
    assert result["images"] == 200
    assert result["weights_sha256"] == bundled
    assert row(ROWS[name], f"{result['mIoU']:.3f}", f"{result['pACC']:.3f}") in PAGE


def test_readmes_figures() -> None:
    few, many = (f"{load(name)['results'][0]['mIoU']:.3f}" for name in ("held-out", "held-out-200"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"is {few} with 20 classes, and {many} with 200 classes." in readme


def test_attributes() -> None:
    found = load("attributes-200")
    assert found["scenes"] == 200
    for name in ("pattern", "colour", "shape"):
        one = found[name]
        assert row(name, *(f"{one[key]:.3f}" for key in ("accuracy", "among_alike", "chance"))) in PAGE
    assert f"| all three | {found['all']:.3f} |" in PAGE
    union = load("held-out-200")["results"][0]["mIoU_union"]
    assert f"the mean would be {union:.3f}." in PAGE


def test_thresholds() -> None:
    content = load("thresholds")
    effects = {effect["min_score"]: effect for effect in content["effects"]}
    rows = re.findall(r"^\| (0\.\d) \| (.+) \|$", PAGE[: PAGE.index("## Generated scenes")], flags=re.M)
    assert len(rows) == 5
    for least, cells in rows:
        effect = effects[float(least)]
        keys = ("right", "wrong", "unlabelled", "rejected")
        assert cells.split(" | ") == [f"{effect[key]:.3f}" for key in keys]
    assert f"{content['best']['min_score']:.1f} has the best balance" in PAGE


def test_agreement_with_the_reference() -> None:
    reference, *others = load("backends")["results"]
    assert reference["images"] == 60
    for name, result in zip(("engine in torch, fp32", "fp16", "bf16"), others, strict=True):
        agreement, difference = result["label_agreement"], abs(result["mIoU"] - reference["mIoU"])
        shown = "100" if agreement == 1 else f"{100 * agreement:.3f}"
        assert row(name, f"{shown} %", f"{difference:.5f}" if difference else 0) in PAGE
    largest = max(max(result["activations"].values()) for result in others[1:])
    assert f"{round(largest, -2):,.0f}".replace(",", " ") in PAGE
