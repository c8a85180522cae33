"""Parts of a training run: recipe, parameter groups, crops, classes of a step, log, command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from catseg_fast import config
from catseg_fast.checkpoints.write import write_weights
from catseg_fast.cli import main as cli
from catseg_fast.cli import train as train_command
from catseg_fast.identity import content_digest
from catseg_fast.reference.finetune import CLIP_FINETUNE
from catseg_fast.training import recipe as recipe_module
from catseg_fast.training.augment import augment
from catseg_fast.training.log import Log
from catseg_fast.training.optimiser import make_optimiser, parameter_groups, set_learning_rate
from catseg_fast.training.output import check_output
from catseg_fast.training.recipe import Recipe
from catseg_fast.training.samples import Crops, choose_classes, remap, step_batches
from catseg_fast.training.start import load_start
from catseg_fast.training.trainer import draw_synonyms
from support.data_sets import make_dataset
from support.tiny import V2, tiny_model
from support.training_run import CLASSES, Blocks, paint

IGNORE = 255


def test_the_defaults_are_upstreams() -> None:
    """Settings of `configs/config.yaml` and `configs/vitl_336.yaml` at 3709783."""
    recipe = Recipe()
    assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.warmup) == (80_000, 4, 2e-4, 0)
    assert (recipe.clip_multiplier, recipe.backbone_multiplier, recipe.weight_decay) == (0.01, 0.0, 1e-4)
    assert (recipe.clip_grad, recipe.clip_finetune, recipe.pooling) == (0.01, "attention", 2)
    assert (recipe.crop_size, recipe.min_sizes, recipe.category_max_ratio) == (384, (), 1.0)
    assert recipe.colour


def test_the_learning_rate_is_half_a_cosine_behind_a_warm_up() -> None:
    recipe = Recipe(steps=100, lr=3.0)
    assert [recipe.learning_rate(step) for step in (0, 25, 50, 75)] == pytest.approx(
        [3.0, 1.5 * (1 + math.sqrt(0.5)), 1.5, 1.5 * (1 - math.sqrt(0.5))]
    )
    warm = replace(recipe, warmup=9)
    assert [
        warm.learning_rate(step) / recipe.learning_rate(step) for step in (0, 4, 9, 10, 99)
    ] == pytest.approx([0.1, 0.5, 1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 is not positive"),
        ({"lr": math.nan}, "lr: nan is not positive"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0 is negative"),
        ({"clip_grad": math.inf}, "clip_grad: inf is negative or not finite"),
        ({"steps": 5, "warmup": 5}, "warmup: 5 is not below the number of steps, 5"),
        ({"batch_size": 5, "accumulate": 2}, "accumulate: 2 does not divide the batch size, 5"),
        ({"min_sizes": (384, 0)}, "min_sizes: 0 is not positive"),
        ({"classes_per_step": 0}, "classes_per_step: 0 is not positive"),
        ({"classes_per_step": 4, "fewest_classes": 5}, "fewest_classes: 5 is not between 1 and .*, 4"),
        ({"classes_per_step": 4, "fewest_classes": 0}, "fewest_classes: 0 is not between 1 and .*, 4"),
        ({"fewest_classes": 3}, "fewest_classes: 3 is not between 1 and classes_per_step, None"),
        ({"precision": "fp8"}, "precision: 'fp8' is not one of fp32, fp16, bf16"),
        ({"clip_finetune": "all"}, "clip_finetune: 'all' is not one of attention, full, prompt, none"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("rule", ["attention", "full"])
def test_parameter_groups_are_upstreams(version: Any, rule: str) -> None:
    """Each parameter by its name: CLIP and backbone are slower, norms and embeddings do not decay."""
    model = tiny_model(version, clip_finetune=rule, train_backbone=True)
    recipe = Recipe(clip_multiplier=0.01, backbone_multiplier=0.1, weight_decay=0.05)
    found = {
        parameter: (group["multiplier"], group["weight_decay"])
        for group in parameter_groups(model, recipe)
        for parameter in group["params"]
    }
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    assert {name.rpartition(".")[2] for name in norms} >= {"norm1", "norm2", "ln_1", "guidance_norm"}
    count = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter not in found
            continue
        multiplier = 0.01 if ".clip_model." in name else 0.1 if name.startswith("backbone.") else 1.0
        still = name.rpartition(".")[0] in norms or name.endswith("relative_position_bias_table")
        assert found[parameter] == (multiplier, 0.0 if still else 0.05), name
        count += 1
    assert len(found) == count


def test_the_optimiser_takes_each_groups_rate() -> None:
    model = nn.ModuleDict({"clip_model": nn.Linear(2, 2), "head": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    optimiser = make_optimiser(model, Recipe())
    set_learning_rate(optimiser, 0.5)
    rates = {len(group["params"]): (group["lr"], group["weight_decay"]) for group in optimiser.param_groups}
    assert [group["lr"] for group in optimiser.param_groups] == [0.005, 0.5, 0.5]
    assert rates[2][1] == 0.0  # the norm, last of three groups of two


def sample(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture of two rows of blocks, whose colour is a function of the label."""
    labels = torch.arange(6).view(2, 3)
    labels = labels.repeat_interleave(height // 2, 0).repeat_interleave(width // 3, 1)
    return paint(labels), labels


@pytest.mark.parametrize(("height", "width"), [(60, 90), (30, 90), (300, 30), (64, 66)])
def test_picture_and_labels_go_together(height: int, width: int) -> None:
    recipe = Recipe(crop_size=64, min_sizes=(64, 96), colour=False)
    image, labels = sample(height, width)
    mirrored = 0
    for seed in range(8):
        crop, found = augment(image, labels, recipe, IGNORE, np.random.default_rng(seed))
        assert crop.shape == (3, 64, 64)
        assert crop.dtype == torch.uint8
        assert found.shape == (64, 64)
        inside = found != IGNORE
        same = (crop.int() - paint(found).int()).abs().amax(dim=0) <= 1
        assert same[inside].double().mean() > 0.8  # all except blurred borders
        assert (crop[:, ~inside] == 128).all()
        columns = found[0][inside[0]]
        mirrored += bool(columns[0] > columns[-1])
    assert height * 3 < width * 3 or mirrored in range(9)


def test_a_small_picture_is_filled_up() -> None:
    image, labels = sample(2, 300)  # its longer side is limited to 1333: the shorter one is 9
    crop, found = augment(image, labels, Recipe(crop_size=64, colour=False), IGNORE, np.random.default_rng(0))
    assert (found[9:] == IGNORE).all()
    assert (found[:9] != IGNORE).all()
    assert (crop[:, 9:] == 128).all()


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = torch.zeros(64, 640, dtype=torch.int64)
    labels[:, 600:] = 1
    image, recipe = paint(labels), Recipe(crop_size=64, colour=False)
    limited = replace(recipe, category_max_ratio=0.9)

    def mixed(recipe: Recipe) -> int:
        crops = (augment(image, labels, recipe, IGNORE, np.random.default_rng(seed)) for seed in range(40))
        return sum(len(found.unique()) > 1 for _, found in crops)

    assert mixed(limited) > 2 * mixed(recipe)


def test_colours_change_and_labels_do_not() -> None:
    image, labels = sample(64, 66)
    recipe = Recipe(crop_size=64)
    plain = replace(recipe, colour=False)
    changed = 0
    for seed in range(6):
        crop, found = augment(image, labels, recipe, IGNORE, np.random.default_rng(seed))
        assert crop.shape == (3, 64, 64)
        assert set(found.unique().tolist()) <= set(range(6))
        changed += not torch.equal(
            crop, augment(image, labels, plain, IGNORE, np.random.default_rng(seed))[0]
        )
    assert changed >= 4


def test_crops_depend_only_on_seed_and_position() -> None:
    recipe = Recipe(steps=6, batch_size=4, crop_size=32, seed=3)
    whole = list(step_batches(Crops(Blocks(), recipe), 0))
    assert [len(batch) for batch in whole] == [4] * 6
    later = list(step_batches(Crops(Blocks(), recipe), 4, workers=1))
    halves = [list(step_batches(Crops(Blocks(), recipe), 4, rank=rank, processes=2)) for rank in range(2)]
    for index, batch in enumerate(later):
        together = halves[0][index] + halves[1][index]
        for entry, one, two in zip(whole[4 + index], batch, together, strict=True):
            assert entry["name"] == one["name"] == two["name"]
            assert torch.equal(entry["image"], one["image"])
            assert torch.equal(entry["sem_seg"], two["sem_seg"])
    names = [entry["name"] for batch in whole for entry in batch]
    epochs = [names[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(Blocks.names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert names != [
        entry["name"] for b in step_batches(Crops(Blocks(), replace(recipe, seed=4)), 0) for entry in b
    ]


def test_bad_labels_name_the_picture() -> None:
    class Wrong(Blocks):
        def __getitem__(self, index: int) -> dict[str, Any]:
            entry = super().__getitem__(index)
            entry["sem_seg"][7, 7] = len(CLASSES)
            return entry

    with pytest.raises(ValueError, match=r"picture-\d: label: 6 is not one of 6 classes or"):
        Crops(Wrong(), Recipe(crop_size=32))[0]


def test_classes_of_a_step() -> None:
    labels = [torch.tensor([[3, 7], [IGNORE, 3]]), torch.tensor([[12, 7]])]
    drawn = [choose_classes(labels, 20, IGNORE, 6, np.random.default_rng(seed)) for seed in range(30)]
    for classes in drawn:
        assert len(classes) == 6
        assert (classes.diff() > 0).all()
        assert {3, 7, 12} <= set(classes.tolist()) <= set(range(20))
    assert len({tuple(classes.tolist()) for classes in drawn}) > 20
    every = torch.arange(20)
    for count in (None, 20, 50):
        assert torch.equal(choose_classes(labels, 20, IGNORE, count, np.random.default_rng(0)), every)
    # All classes of the pictures stay.
    assert choose_classes(labels, 20, IGNORE, 2, np.random.default_rng(0)).tolist() == [3, 7, 12]
    nothing = [torch.full((2, 2), IGNORE)]
    assert len(choose_classes(nothing, 20, IGNORE, 4, np.random.default_rng(0))) == 4


@pytest.mark.parametrize("ignore", [255, 65535])
def test_labels_are_indices_into_a_steps_classes(ignore: int) -> None:
    classes = torch.tensor([3, 7, 12])
    labels = torch.tensor([[3, ignore, 12], [7, 7, 3]])
    expected = torch.tensor([[0, ignore, 2], [1, 1, 0]])
    assert torch.equal(remap(labels, classes, 300, ignore), expected)


def test_synonyms() -> None:
    labels = ["ring", "red ring, crimson ring", "band, ring"]
    drawn = {tuple(draw_synonyms(labels, np.random.default_rng(seed))) for seed in range(40)}
    assert drawn == {
        ("ring", red, band) for red in ("red ring", "crimson ring") for band in ("band", "band, ring")
    }


def test_the_log_forgets_what_is_done_again(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in range(5):
        log.write(step, loss=step / 2)
    log.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
    log = Log(tmp_path, 3)
    log.write(3, loss=9.0)
    log.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_run_may_start_from_only_clip() -> None:
    source, target = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    clip = {key: value for key, value in source.state_dict().items() if ".clip_model." in key}
    load_start(target, clip, "clip.safetensors")
    assert torch.equal(target.clip_model.visual.conv1.weight, source.clip_model.visual.conv1.weight)
    assert not torch.equal(target.aggregator.head.weight, source.aggregator.head.weight)
    load_start(target, source.state_dict(), "whole.safetensors")
    assert torch.equal(target.aggregator.head.weight, source.aggregator.head.weight)
    for name in [key for key in clip if key.endswith("attn.q_proj_weight")]:  # as open_clip has them
        parts = (clip.pop(name.replace(".q_", f".{part}_")) for part in "qkv")
        clip[name.replace("q_proj_weight", "in_proj_weight")] = torch.cat(list(parts))
    joint = {key.partition(".clip_model.")[2]: value for key, value in clip.items()}
    third = tiny_model()
    load_start(third, joint, "open_clip.safetensors")
    for key, value in source.clip_model.state_dict().items():
        assert torch.equal(third.clip_model.state_dict()[key], value), key
    clip.popitem()
    with pytest.raises(ValueError, match=r"clip\.safetensors does not fit the model"):
        load_start(target, clip, "clip.safetensors")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set in a folder: what `FolderDataset` reads."""

    root, blocks = tmp_path / "data", Blocks()
    for part in ("images", "annotations"):
        (root / part).mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps(CLASSES))
    for index in range(len(blocks)):
        entry = blocks[index]
        image, labels = entry["image"].permute(1, 2, 0).numpy(), entry["sem_seg"].numpy().astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"{entry['name']}.png")
        Image.fromarray(labels).save(root / "annotations" / f"{entry['name']}.png")
    return root


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["train", *arguments])


def test_the_command_trains_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.VARIANTS, "v2-vitb", replace(V2, name="v2-vitb"))
    output = tmp_path / "out"
    arguments = [
        "--data", str(data), "--output", str(output), "--device", "cpu", "--workers", "0",
        "--batch-size", "1", "--crop-size", "64", "--classes-per-step", "4", "--fewest-classes", "2",
        "--random-synonyms",
        "--no-colour", "--steps", "2", "--weights-type", "fp16", "--save-every", "1",
    ]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 steps done; wrote" in result.stdout
    assert "2/2  loss" in result.stderr
    assert (output / "model.safetensors").stat().st_size > 0
    again = invoke(*arguments)
    assert again.exit_code == 0, again.output
    assert "continuing after step 2 of 2" in again.stderr
    other = invoke(*arguments, "--lr", "1e-3")
    assert other.exit_code == 1
    assert "holds another run:" in other.stderr
    assert "lr: 0.0002 there, 0.001 here" in other.stderr
    weights = output / "model.safetensors"
    other = invoke(*arguments, "--init", str(weights))
    assert f"start: None there, {content_digest(weights)} here" in " ".join(other.stderr.split())
    path = next((data / "annotations").iterdir())
    before = path.read_bytes()
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)  # of the same size and name
    other = invoke(*arguments)
    path.write_bytes(before)
    assert other.exit_code == 1
    assert "holds another run:" in other.stderr
    assert "  data: " in other.stderr
    start = invoke(
        *arguments, "--lr", "1e-3", "--fresh", "--steps", "1", "--init", str(output / "model.safetensors")
    )
    assert start.exit_code == 0, start.output


def test_the_commands_choices_are_the_recipes() -> None:
    assert train_command.CLIP_RULES == CLIP_FINETUNE
    assert train_command.PRECISIONS == recipe_module.PRECISIONS


def test_help_and_bad_arguments(data: Path, tmp_path: Path) -> None:
    text = invoke("--help").stdout
    for option in (
        "--classes-per-step",
        "--resume",
        "--clip-finetune",
        "--accumulate",
        "Examples",
        "torchrun",
    ):
        assert option in text
    assert "Missing option '--data'" in invoke().stderr
    assert invoke("--data", str(tmp_path / "none")).exit_code == 2
    assert invoke("--data", str(data), "--precision", "fp8").exit_code == 2
    file = tmp_path / "file"
    file.touch()
    boxed = invoke("--data", str(data), "--output", str(file)).stderr
    assert "file is not a folder" in " ".join(boxed.replace("│", " ").split())
    wrong = invoke("--data", str(data), "--output", str(tmp_path / "out"), "--accumulate", "3")
    assert wrong.exit_code == 1
    assert "accumulate: 3 does not divide the batch size, 4" in wrong.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "log.jsonl"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    """For example converted weights, from which the run may even start."""
    make_dataset(tmp_path / "data")
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir()
    if name == "log.jsonl":
        foreign.write_text('{"event": "mine"}\n')
    else:
        write_weights(foreign, {"a": torch.ones(2)}, {"format": "pt", "catseg_fast": "0.1"})
    before = foreign.read_bytes()
    result = invoke("--data", str(tmp_path / "data"), "--output", str(foreign.parent))
    assert result.exit_code == 1
    assert f"{name} exists and does not belong to a training run" in result.stderr
    assert foreign.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", '{"step"', '{"step": 0, "loss": 1}\n'])
def test_the_log_of_a_run_that_was_killed_is_its_own(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    check_output(tmp_path)
