"""Accelerated aggregators under compilers, tracers, modes that see each operation, and threads."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from catseg_fast import accelerate
from support.alterations import OTHER
from support.derived import RotatedAdapter, RotatedMaps
from support.upstream_like import assert_equal, assert_same, make_aggregator, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning", "ignore::DeprecationWarning")


def test_a_compiled_wrapper_of_what_is_accelerated_later() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    compiled = torch.compile(aggregator, backend="eager")
    accelerate(aggregator)
    assert_same(compiled, own, 3)


def test_compiled_calls_are_compared_and_guarded() -> None:
    aggregator = make_aggregator()
    OTHER["many classes otherwise"](aggregator)
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    assert acceleration.engines
    compiled = torch.compile(aggregator, backend="eager")
    assert_same(compiled, own, 3, 12)
    for net in (aggregator, own):
        net.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_same(compiled, own, 3)


def test_tracing_records_the_models_own_code() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(aggregator, make_inputs(3, 2), check_trace=False)
        assert torch.equal(traced(*make_inputs(3, 2)), own(*make_inputs(3, 2)))


@torch.no_grad()
def test_threads_do_not_get_each_others_cost_volume() -> None:
    aggregator = make_aggregator(RotatedMaps, pad_len=0)
    own = copy.deepcopy(aggregator)
    accelerate(aggregator, adapters={RotatedMaps: RotatedAdapter()})
    image, text, guidance = make_inputs(9, 2)
    batches = [([k * image + k, image.roll(k, 3)], text[:, :, :1], guidance) for k in range(1, 5)]
    expected = [own(*batch) for batch in batches]
    aggregator(*batches[0])
    start, wrong = threading.Barrier(len(batches)), list[str]()

    def call(index: int) -> None:
        with torch.no_grad():
            start.wait()
            for _ in range(5):
                try:
                    assert_equal(aggregator(*batches[index]), expected[index], index)
                except AssertionError as error:
                    wrong.append(str(error))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Scaled(TorchFunctionMode):
    """Every softmax is twice as large."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        return 2 * answer if func in (torch.softmax, F.softmax, Tensor.softmax) else answer


@torch.no_grad()
def test_modes_see_the_models_own_code() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    image, text, guidance = batch = make_inputs(3, 2)
    assert_same(aggregator, own)

    def with_flop(net: nn.Module) -> Any:
        with FlopCounterMode(display=False) as counter:
            net(*batch)
        return counter.get_total_flops()

    def vmapped(net: nn.Module) -> Any:
        return vmap(lambda words: net(image, words, guidance))(torch.stack([text, text.flip(1)]))

    def called(net: nn.Module) -> Any:
        weights = {name: 0.9 * x for name, x in net.named_parameters()}
        return functional_call(net, weights, batch)

    def tangents(net: nn.Module) -> Any:
        return jvp(lambda features: net(features, text, guidance), (image,), (image.flip(2),))

    def scaled(net: nn.Module) -> Any:
        with Scaled():
            return net(*batch)

    for run in (with_flop, vmapped, called, tangents, scaled):
        torch.testing.assert_close(run(aggregator), run(own), rtol=0, atol=5e-5)
        assert_same(aggregator, own)
    assert acceleration.explain().startswith("the model (aggregator): the engine")


@torch.no_grad()
def test_another_default_type() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    assert_same(aggregator, own)
    torch.set_default_dtype(torch.float64)
    try:
        image, text, guidance = make_inputs(3, 2)
        assert_equal(aggregator(image, text, guidance), own(image, text, guidance), "few classes")
        batch = make_inputs(7, 2)
        with pytest.raises(RuntimeError, match="dtype"):
            own(*batch)  # fills up with another type
        with pytest.raises(RuntimeError, match="dtype"):
            aggregator(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
