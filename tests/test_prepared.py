"""Prepared launches compute what ordinary ones do, on other tensors, whatever becomes of the first ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.engine.launches.notes import NotPreparable
from catseg_fast.engine.launches.prepared import prepare
from catseg_fast.engine.launches.prepared_calls import PreparedCalls
from catseg_fast.kernels import OPS, load
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.launcher import run
from catseg_fast.kernels.launch.op import Random


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    tl.store(out_ptr + o, tl.load(x_ptr + o, m, 0.0) + tl.load(y_ptr + o, m, 0.0), m)


class Config(LaunchConfig):
    num_warps = 4


def add(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    run(add_kernel, (triton.cdiv(x.numel(), 16),), x, y, out, x.numel(), config=Config(), BLOCK=16)
    return out


def chain(x: Tensor, y: Tensor | None) -> Tensor:
    """Four buffers, of which never more than two are needed at a time."""
    for _ in range(5):
        x = add(x, x if y is None else y)
    return x


def test_other_inputs_and_no_input() -> None:
    for y in (None, torch.full((37,), 2.0)):
        first, prepared = prepare(chain, torch.ones(37), y)
        assert torch.equal(first, chain(torch.ones(37), y))
        x = torch.arange(37.0)
        other = None if y is None else torch.arange(37.0) ** 2
        assert torch.equal(prepared(x, other), chain(x, other))


def add_into(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    run(add_kernel, (triton.cdiv(x.numel(), 16),), x, y, out, x.numel(), config=Config(), BLOCK=16)
    return out


def test_a_destination_is_written_and_returned() -> None:
    state = torch.zeros(3, 16)
    result, prepared = prepare(add_into, torch.ones(16), torch.ones(16), state[1])
    assert result.data_ptr() == state[1].data_ptr()
    out = state[2]
    assert prepared(torch.ones(16), torch.full((16,), 4.0), out) is out
    assert state.mean(dim=1).tolist() == [0, 2, 5]


def test_a_repetition_that_writes_something_else_is_undone() -> None:
    calls, state = PreparedCalls(), torch.zeros(16)
    hidden = iter([torch.full((16,), float(value)) for value in range(10)])

    def function(x: Tensor, out: Tensor) -> Tensor:
        return add_into(x, next(hidden), out)

    calls("key", function, torch.zeros(16), state)
    with pytest.warns(RuntimeWarning, match="another result"):
        calls("key", function, torch.zeros(16), state)
    assert state.tolist() == [1.0] * 16


def test_buffers_share_memory_once_they_are_not_needed() -> None:
    _, prepared = prepare(chain, torch.ones(1000), None)
    assert 8000 <= prepared.shared_bytes <= 8192  # two of 4000 bytes, aligned


def test_weights_stay_and_are_kept_alive() -> None:
    weight = torch.full((8,), 3.0)
    _, prepared = prepare(lambda x, weight=weight: add(x, weight), torch.ones(8))
    del weight
    torch.full((8,), -1.0)
    assert prepared(torch.zeros(8)).tolist() == [3.0] * 8


def test_slices_of_a_larger_tensor() -> None:
    state = torch.arange(64.0).view(4, 16)
    _, prepared = prepare(add, state[1], state.clone()[2])
    assert torch.equal(prepared(state[3], torch.ones(16)), state[3] + 1)
    assert torch.equal(prepared(state[0], torch.ones(16)), state[0] + 1)


def test_an_address_that_is_used_again_is_another_buffer() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(20):  # each buffer is freed at once; the next one may have its address
            y = add(x, x)
            x = add(y, x)
            del y
        return x

    x = torch.full((24,), 1e-3)
    _, prepared = prepare(function, x)
    for value in (1e-3, 2e-3, -1e-3):
        other = torch.full((24,), value)
        assert torch.equal(prepared(other), function(other))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: add(x, x * 2), "it computes with mul"),
        (lambda x: add(x, x.T.contiguous().T), "it computes with clone"),
        (lambda x: x[1:], "a part of an input"),
        (lambda x: add(x, x)[1:], "contiguous tensors that it allocated"),
        (lambda x: None, "something other"),
        (lambda x: (), "nothing"),
    ],
)
def test_what_cannot_be_prepared(function: Any, reason: str) -> None:
    with pytest.raises(NotPreparable, match=reason):
        prepare(function, torch.ones(4, 4))


def test_inputs_that_share_memory_are_refused() -> None:
    x = torch.ones(17)
    with pytest.raises(NotPreparable, match="two inputs share memory"):
        prepare(add, x[:16], x[1:])


def grow(x: Tensor, out: Tensor) -> Tensor:
    """Three times x, of which nothing is needed any more when it is overwritten."""
    return add_into(add(x, x), x, out)


def test_an_input_that_is_overwritten() -> None:
    calls, state = PreparedCalls(), torch.ones(4, 16)
    for step in range(1, 5):
        x = state[1]
        assert calls("key", grow, x, x).data_ptr() == x.data_ptr()
        assert state.mean(dim=1).tolist() == [1, 3**step, 1, 1]
    assert calls.repeated == 2
    assert calls("key", grow, state[1], state[2]).tolist() == [3.0**5] * 16  # not the same view: as it is
    assert state.mean(dim=1).tolist() == [1, 3**4, 3**5, 1]
    assert calls.repeated == 2


def test_what_cannot_be_prepared_runs_once_per_call() -> None:
    calls, state = PreparedCalls(), torch.ones(16)

    def function(x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(grow(x, out) + 0)

    for step in range(1, 4):
        assert calls("key", function, state, state).tolist() == [3.0**step] * 16


def test_a_call_is_run_prepared_compared_and_then_repeated() -> None:
    calls, made = PreparedCalls(), []

    def function(x: Tensor, y: Tensor) -> Tensor:
        made.append(x)
        return add(x, y)

    for step in range(5):
        x, y = torch.full((20,), float(step)), torch.ones(20)
        assert torch.equal(calls("add", function, x, y), x + 1)
    assert (len(made), calls.repeated) == (2, 3)
    calls("add", function, torch.ones(21), torch.ones(21))  # another size
    calls("add", function, torch.ones(21)[1:], torch.ones(20))  # another alignment
    calls("other", function, torch.ones(20), torch.ones(20))
    assert (len(made), calls.repeated) == (5, 3)


def test_a_repetition_that_differs_is_given_up() -> None:
    calls = PreparedCalls()
    hidden = iter([torch.full((4,), float(value)) for value in range(10)])

    def function(x: Tensor) -> Tensor:
        return add(x, next(hidden))  # changes from call to call, though it is no input

    assert calls("key", function, torch.zeros(4)).tolist() == [0.0] * 4
    with pytest.warns(RuntimeWarning, match="slower: another result"):
        assert calls("key", function, torch.zeros(4)).tolist() == [1.0] * 4
    assert calls("key", function, torch.zeros(4)).tolist() == [2.0] * 4
    assert calls.repeated == 0


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_op_on_other_tensors(name: str, dtype: torch.dtype) -> None:
    op = load(name)
    sizes = op.odd[0]
    device = torch.device("cpu")

    def inputs(seed: int) -> dict[str, Any]:
        return op.make_inputs(sizes, Random(dtype, device, seed))

    first = inputs(0)
    dynamic = [name for name, x in first.items() if isinstance(x, Tensor)]

    def function(*tensors: Tensor) -> Any:
        return op.launch(*(first | dict(zip(dynamic, tensors, strict=True))).values(), "ieee")

    _, prepared = prepare(function, *(first[name] for name in dynamic))
    for seed in random.sample(range(1, 1000), 2):
        other = [inputs(seed)[name] for name in dynamic]
        for ours, expected in zip(
            torch.utils._pytree.tree_leaves(prepared(*other)),
            torch.utils._pytree.tree_leaves(function(*other)),
            strict=True,
        ):
            assert torch.equal(ours, expected)


def test_a_comparison_for_which_there_is_no_memory_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state may have been written to: what is out of memory then must not look as if it had not."""
    calls, state = PreparedCalls(), torch.zeros(16)

    def call(value: float) -> Tensor:
        return calls("key", add_into, torch.full((16,), value), state.clone(), state)

    def run_out(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    call(1.0)
    with monkeypatch.context() as patch:
        patch.setattr("catseg_fast.engine.launches.prepared_calls._same_bits", run_out)
        assert call(2.0).tolist() == [3.0] * 16
    assert call(3.0).tolist() == [6.0] * 16
    assert calls.repeated == 0
    assert call(4.0).tolist() == [10.0] * 16
    assert calls.repeated == 1
