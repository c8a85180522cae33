"""Every op against its plain form, as its declaration says (`kernels/launch/op.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from catseg_fast.kernels import OPS, TUNABLE_OPS, load
from catseg_fast.kernels.launch import configs
from catseg_fast.kernels.launch.capability import CAPABILITIES, assume
from catseg_fast.kernels.launch.launcher import record
from catseg_fast.kernels.launch.op import Form, Random, Sizes
from support.accuracy import assert_matches_its_plain_form, parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes bf16 incorrectly

odd_sizes = pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(name, sizes, id=f"{name}-{i}") for name in OPS for i, sizes in enumerate(load(name).odd)],
)
every_op = pytest.mark.parametrize("name", OPS)


def make(name: str, dtype: torch.dtype = torch.float32, sizes: Sizes | None = None) -> dict[str, Any]:
    op = load(name)
    return op.make_inputs(sizes or op.odd[0], Random(dtype, DEVICE))


def test_new_tensors_hold_nan() -> None:
    """Values that a kernel does not write are found (`_poison` in conftest.py)."""
    ones = torch.ones(3)
    for x in (torch.empty(3), torch.empty_like(ones), ones.new_empty(3)):
        assert x.isnan().all()
    assert torch.empty(3, dtype=torch.int32).shape == (3,)


@odd_sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_its_plain_form(name: str, sizes: Sizes, dtype: torch.dtype) -> None:
    assert_matches_its_plain_form(load(name), make(name, dtype, sizes))


@every_op
def test_two_runs_are_equal(name: str) -> None:
    op, inputs = load(name), make(name, torch.float16)
    first, second = (parts(op.triton(**inputs)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_op
def test_custom_op_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the assumptions of `torch.compile`: the schema, the fake, and no hidden writes."""
    inputs = make(name)
    monkeypatch.undo()
    rest = () if name == "update_label_map" else ("ieee",)
    torch.library.opcheck(getattr(torch.ops.catseg_fast, name).default, (*inputs.values(), *rest))


@every_op
def test_compiles_into_one_graph(name: str) -> None:
    op, inputs = load(name), make(name)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}

    def call(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in parts(op.triton(**{**inputs, **tensors})))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(tensors), call(tensors)))


@every_op
def test_autocast_changes_nothing(name: str) -> None:
    op, inputs = load(name), make(name)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = parts(op.triton(**inputs))
    assert all(map(torch.equal, inside, parts(op.triton(**inputs))))


@every_op
def test_a_gradient_is_an_error(name: str) -> None:
    op, inputs = load(name), make(name)
    first, value = next(iter(inputs.items()))
    out, *_ = parts(op.triton(**{**inputs, first: value.requires_grad_()}))
    with pytest.raises((RuntimeError, NotImplementedError), match="autograd"):
        out.sum().backward()


@every_op
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_dry_run_launches_what_a_run_does(name: str, capability: int) -> None:
    """On the meta device, arguments are the same except for the values of tensors."""
    op, sizes = load(name), load(name).odd[0]
    _, dry = op.dry_run(sizes, torch.float16, "ieee", capability)
    inputs = make(name, torch.float16)
    with assume(capability), record() as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", lambda problem, _, default, *__: default(capability, problem))
        op.launch(*inputs.values(), "ieee")
    described = [
        [
            (
                launch.kernel.__name__, dict(launch.constants), dict(launch.options),
                [describe(value) for value in launch.arguments.values()],
            )
            for launch in found
            if name != "update_label_map"  # whose programs are larger in the interpreter
        ]
        for found in (dry, launches)
    ]  # fmt: skip
    assert described[0] == described[1]
    assert [launch.kernel for launch in dry] == [launch.kernel for launch in launches]


def describe(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return describe(value.base), value.shape, value.strides, value.block_shape
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def test_the_first_form_that_supports_a_call_runs() -> None:
    def fails(*_: Any) -> None:
        raise AssertionError

    op, inputs = load("window_block"), make("window_block")
    newer = Form(fails, lambda capability, *_: "needs TMA" if capability < 90 else None)
    both = replace(op, forms=(newer, *op.forms))
    with assume(89):
        assert torch.equal(both.launch(*inputs.values(), "ieee"), op.triton(**inputs))
        with pytest.raises(ValueError, match="window_block: needs TMA"):
            replace(op, forms=(newer,)).launch(*inputs.values(), "ieee")
    with assume(90), pytest.raises(AssertionError):
        both.launch(*inputs.values(), "ieee")


def test_tunable_ops_are_those_whose_kernels_choose_a_config() -> None:
    for name in OPS:
        op = load(name)
        calls, launches = op.dry_run(op.odd[0], torch.float16, "ieee", 90)
        assert launches
        assert bool(calls) == (name in TUNABLE_OPS)
        assert {call.problem.op for call in calls} <= {name}
