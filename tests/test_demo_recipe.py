"""The demo model's pre-training: it learns, and an interrupted run continues."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from catseg_fast.data.scenes import write_dataset
from catseg_fast.data.scenes.words import GROUNDS
from support.documents import ROOT

BUNDLED = ROOT / "catseg_fast" / "checkpoints" / "demo.safetensors"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = ROOT / "examples" / "demo_model" / "pretrain_clip.py"
    spec = importlib.util.spec_from_file_location("pretrain_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_clip"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, "train", 3, seed=1, processes=1)
    return folder


def test_views_show_the_patches_that_they_name(recipe: ModuleType, scenes: Path) -> None:
    """Labels and pixels of every patch in a view of the whole picture are those of its place."""
    views = recipe.Views(scenes, 0, 3, seed=0)
    pixels, points, (chosen, places) = views.batch(4, 24, 576)
    assert torch.equal(chosen, torch.arange(576).expand(4, -1))
    assert torch.equal(places, chosen)
    image, labels = views.images[0], views.annotations[0]
    for patches, classes in zip(pixels, points, strict=True):
        assert set(classes.unique().tolist()) <= set(np.unique(labels).tolist())
        mean = patches.view(576, 3, 256).float().mean(dim=(0, 2))
        assert np.abs(mean.numpy() - image.mean(axis=(0, 1))).max() < 60


def test_windows_are_around_things_and_leave_out_grounds_first(recipe: ModuleType, scenes: Path) -> None:
    views = recipe.Views(scenes, 0, 1, seed=0)
    _, points, (chosen, places) = views.batch(16, 12, 96)
    things = (points >= len(GROUNDS)).any(4).any(3).flatten(1)
    assert things.any(1).all()
    seen = torch.zeros_like(things).scatter_(1, chosen, True)
    assert seen.sum(1).tolist() == [96] * 16
    near = F.max_pool2d(things.view(-1, 1, 12, 12).float(), 3, stride=1, padding=1).flatten(1) > 0
    assert ((near & ~seen).any(1) == (near.sum(1) > 96)).all()
    rows, columns = places // 24 - chosen // 12, places % 24 - chosen % 12
    assert (rows == rows[:, :1]).all()  # a window keeps its arrangement wherever it is placed
    assert (columns == columns[:, :1]).all()


def test_a_block_is_the_model_s_own(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    model = recipe.CATSeg(recipe.DEMO)
    block = model.clip_model.visual.transformer.resblocks[1].eval()
    x, own = torch.randn(2, 10, recipe.WIDTH), torch.tensor([[0] * 9, [0, 1, 1, 2, 0, 1, 2, 2, 2]])
    with torch.no_grad():
        out, companions = recipe.run_block(block, x, own)
        torch.testing.assert_close(out, block(x), atol=1e-5, rtol=1e-5)
        _, alone = recipe.run_block(block, x, torch.arange(9).expand(2, -1))
    assert 0 < companions < alone


def test_an_interrupted_run_goes_on(
    recipe: ModuleType, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "clip.safetensors"

    def run(steps: int) -> None:
        options = {"data": scenes, "init": BUNDLED, "output": output, "steps": steps, "batch-size": 2}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["pretrain_clip.py", *arguments])
        recipe.main()

    run(2)
    first = load_file(output)
    run(4)
    second = load_file(output)
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]).all() for row in rows)
    state = torch.load(output.with_suffix(".state.pt"), weights_only=True)
    assert state["step"] == 4
    before = load_file(BUNDLED)
    visual = "sem_seg_head.predictor.clip_model.visual.transformer.resblocks.0.attn.q_proj_weight"
    assert not torch.equal(first[visual], before[visual].float())
    assert not torch.equal(second[visual], first[visual])
    aggregator = "sem_seg_head.predictor.transformer.conv1.weight"
    assert torch.equal(second[aggregator], before[aggregator].float())
