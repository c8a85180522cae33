"""Keys and shapes of upstream's real configurations, which the published checkpoints have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from catseg_fast.checkpoints.checkpoint import IGNORED_KEYS, load_into, recognise_variant
from catseg_fast.config import VARIANTS
from catseg_fast.model import CATSeg

LISTS = sorted((Path(__file__).parent / "upstream_keys").glob("*.txt"))
lists = pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)


def upstream_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read lines "key 64x3x7x7" or "key scalar"."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {key: () if size == "scalar" else tuple(map(int, size.split("x"))) for key, size in pairs}


def upstream_state_dict(path: Path) -> dict[str, Tensor]:
    """Return an upstream checkpoint without its numbers."""
    return {
        key: torch.empty(
            shape,
            dtype=torch.int64 if key.endswith("relative_position_index") else torch.float32,
            device="meta",
        )
        for key, shape in upstream_shapes(path).items()
    }


def meta_model(variant: str) -> CATSeg:
    with torch.device("meta"):
        return CATSeg(variant)


def shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def test_the_lists_are_there() -> None:
    assert [path.stem for path in LISTS] == ["v1-vitb-r101", "v1-vitl-swinb", "v2-vitb", "v2-vitl"]
    assert [len(upstream_shapes(path)) for path in LISTS] == [898, 896, 484, 652]


@lists
def test_loads_strictly_and_keeps_keys_and_shapes(path: Path) -> None:
    state_dict = upstream_state_dict(path)
    model = meta_model(path.stem)
    load_into(model, state_dict, path.name)
    assert shapes(model.state_dict()) == upstream_shapes(path)

    model = meta_model(path.stem)
    model.load_state_dict(state_dict, strict=True, assign=True)  # torch's own check, nothing ignored
    assert shapes(model.state_dict()) == upstream_shapes(path)


@lists
def test_a_checkpoint_names_its_variant(path: Path) -> None:
    assert recognise_variant(upstream_state_dict(path)) is VARIANTS[path.stem]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_recognises_itself(name: str) -> None:
    assert recognise_variant(meta_model(name).state_dict()) is VARIANTS[name]


@lists
def test_every_other_variant_refuses(path: Path) -> None:
    state_dict = upstream_state_dict(path)
    for other in LISTS:
        if other != path:
            with pytest.raises(ValueError, match=f"looks like {path.stem}; the model is {other.stem}"):
                load_into(meta_model(other.stem), state_dict)


@lists
def test_only_derived_buffers_are_ignored(path: Path) -> None:
    ignored = {key.rsplit(".", 1)[-1] for key in upstream_shapes(path) if IGNORED_KEYS.search(key)}
    assert ignored == {"attn_mask"} | ({"relative_position_index"} if "swin" in path.stem else set())
    assert not any(IGNORED_KEYS.search(name) for name, _ in meta_model(path.stem).named_parameters())


@lists
def test_each_missing_or_extra_key_counts(path: Path) -> None:
    state_dict = upstream_state_dict(path)
    model = meta_model(path.stem)
    keys = [key for key in state_dict if not IGNORED_KEYS.search(key)]
    for key in (*keys[::97], keys[-1]):
        lacking = {name: value for name, value in state_dict.items() if name != key}
        with pytest.raises(ValueError, match=rf"1 missing from the file:\n +{key}$"):
            load_into(model, lacking)
        with pytest.raises(ValueError, match=rf"1 not in the model:\n +{key}_extra$"):
            load_into(model, {**state_dict, key + "_extra": state_dict[key]})
