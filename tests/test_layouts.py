"""Checkpoints in the layouts of trainers, under the keys of wrappers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from catseg_fast import CATSeg
from catseg_fast.checkpoints.checkpoint import (
    convert,
    load_into,
    read_checkpoint,
    recognise_variant,
)
from support import hostile_files as hostile
from support.tiny import tiny_model

AGGREGATOR = "sem_seg_head.predictor.transformer."


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny_model().state_dict()


def before(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def inside(name: str, *places: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Insert a wrapper's name after the names of modules."""

    def wrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for place in places:
            state = {key.replace(f"{place}.", f"{place}.{name}.", 1): value for key, value in state.items()}
        return state

    return wrap


def under(*keys: str, **others: Any) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    def hold(state: dict[str, Tensor]) -> dict[str, Any]:
        content: Any = state
        for key in reversed(keys):
            content = {key: content, **others}
        return content

    return hold


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "compiled": before("_orig_mod."),
    "compiled, data parallel": before("module._orig_mod."),
    "data parallel, compiled": before("_orig_mod.module."),
    "compiled modules": inside("_orig_mod", "transformer", "visual", "head"),
    "FSDP": inside("_fsdp_wrapped_module", "sem_seg_head", "visual", "transformer"),
    "recomputed": inside("_checkpoint_wrapped_module", "visual", "resblocks.0"),
    "Lightning": lambda state: under("state_dict", epoch=3, hyper_parameters={"lr": 1e-3})(
        before("model.")(state)
    ),
    "Lightning, compiled": lambda state: under("state_dict")(before("model._orig_mod.")(state)),
    "Fabric": lambda state: under("model", step=3)(before("_forward_module.")(state)),
    "DeepSpeed": under("module", dp_world_size=8, lr_scheduler=None),
    "DeepSpeed, Lightning": lambda state: under("module")(before("_forward_module.model.")(state)),
    "model_state_dict": under("model_state_dict", optimizer_state_dict={}),
    "nested": under("state_dict", "model"),
    "settings under model": lambda state: {"model": {"name": "cat-seg"}, "state_dict": state},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **before("module.")(state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_trainers(layout: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    content = LAYOUTS[layout](state)
    assert content.keys() != state.keys()
    torch.save(content, tmp_path / "weights.pth")
    paths = [tmp_path / "weights.pth"]
    if all(isinstance(value, Tensor) for value in content.values()):
        paths.append(tmp_path / "weights.safetensors")
        save_file(content, paths[1])
    for path in paths:
        found = read_checkpoint(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())


class Compiled(nn.Module):
    """A model with a compiled module in it."""

    def __init__(self, model: CATSeg) -> None:
        super().__init__()
        model.sem_seg_head.predictor.transformer = torch.compile(model.sem_seg_head.predictor.transformer)
        self.model = model


WRAPPERS: dict[str, Callable[[CATSeg], nn.Module]] = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "checkpoint_wrapper": checkpoint_wrapper,
    "several": lambda model: nn.DataParallel(torch.compile(model)),
    "compiled module": Compiled,
}  # type: ignore[assignment]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wrappers_save_today(wrapper: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """The names are torch's: this test fails if torch changes them."""
    wrapped = WRAPPERS[wrapper](tiny_model())
    torch.save(wrapped.state_dict(), tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth").keys() == state.keys()


def test_what_an_averaged_model_saves_today(tmp_path: Path) -> None:
    clip = tiny_model().clip_model
    torch.save(AveragedModel(clip).state_dict(), tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth").keys() == clip.state_dict().keys()


def test_from_pretrained_and_convert(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": before("model._orig_mod.")(state)}, tmp_path / "weights.ckpt")
    model = CATSeg.from_pretrained(tmp_path / "weights.ckpt", ["a"], device="cpu")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    convert(tmp_path / "weights.ckpt", tmp_path / "weights.safetensors")
    assert read_checkpoint(tmp_path / "weights.safetensors").keys() == state.keys()


@pytest.mark.parametrize("prefix", ["student.", "ema.", "segmentor.backbone.", "model.net."])
def test_an_unknown_prefix_is_named(prefix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(before(prefix)(state), path)
    shown = re.escape(prefix.removeprefix("model."))
    with pytest.raises(
        ValueError, match=rf"looks like custom-v2.* with '{shown}' before its keys; take that off"
    ):
        CATSeg.from_pretrained(path)
    with pytest.raises(ValueError, match=rf"file looks like custom-v2.* with '{shown}' before its keys"):
        load_into(tiny_model(), read_checkpoint(path))
    torch.save({**before(prefix)(state), "loss.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=rf"with '{re.escape(prefix)}' before its keys"):
        CATSeg.from_pretrained(path)


def test_what_is_unknown_under_one_prefix() -> None:
    with pytest.raises(ValueError, match=r"nothing known \(2 tensors, all under 'a\.b\.': a\.b\.x, a\.b\.y"):
        recognise_variant({"a.b.x": torch.zeros(1), "a.b.y": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"nothing known \(2 tensors: a\.x, b\.x"):
        recognise_variant({"a.x": torch.zeros(1), "b.x": torch.zeros(1)})


def test_two_tensors_of_one_key(tmp_path: Path) -> None:
    torch.save({"a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth holds two tensors whose keys differ only"):
        read_checkpoint(tmp_path / "weights.pth")


def test_other_dictionaries_are_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "net": {"a": torch.zeros(1)}}, tmp_path / "weights.pth")
    reason = r"its entry 'epoch' is a int\. A state dict is looked for under .*; the file has epoch, net"
    with pytest.raises(ValueError, match=reason):
        read_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize("key", ["model", "module"])
def test_a_dictionary_in_itself(key: str, tmp_path: Path) -> None:
    content = b"\x80\x02}q\x00" + hostile.text(key) + b"h\x00s."
    (tmp_path / "weights.pth").write_bytes(hostile.archive(content))
    with pytest.raises(ValueError, match="holds no state dict"):
        read_checkpoint(tmp_path / "weights.pth")
