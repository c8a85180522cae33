"""Accelerated aggregators in what programs put around models: DDP, FSDP, compilers, copies, state dicts."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from catseg_fast import accelerate
from catseg_fast.errors import InputError
from support.derived import RotatedMaps
from support.later_alterations import Adapted
from support.process_group import single_process_group
from support.upstream_like import Aggregator, assert_equal, assert_same, make_aggregator, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:model:RuntimeWarning", "ignore::DeprecationWarning")


class Predictor(nn.Module):
    def __init__(self, aggregator: nn.Module) -> None:
        super().__init__()
        self.transformer = aggregator

    def forward(self, *arguments: Any) -> Tensor:
        answer: Tensor = self.transformer(*arguments)
        return answer


@pytest.mark.parametrize("first", ["accelerate", "wrap"])
def test_distributed_data_parallel(first: str, tmp_path: Path) -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    with single_process_group(tmp_path):
        if first == "accelerate":
            accelerate(aggregator)
            model = DistributedDataParallel(aggregator)
        else:
            model = DistributedDataParallel(aggregator)
            assert list(accelerate(model).engines) == ["module"]
        assert_same(model, own)
        for net in (model, own):
            net.train()
            net(*make_inputs(3, 2)).sum().backward()
            torch.optim.SGD(net.parameters(), lr=1e-6).step()
            net.eval()
        for found, expected in zip(model.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
        assert_same(model, own)


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    with single_process_group(tmp_path):
        sharded = fully_shard(make_aggregator(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(InputError, match=r"^model: .*is a DTensor, expected a plain tensor"):
            accelerate(sharded)


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_sharding_after_accelerating(kind: str, tmp_path: Path) -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    accelerate(aggregator)
    assert_same(aggregator, own)
    with single_process_group(tmp_path):
        if kind == "fully_shard":
            model: Any = fully_shard(aggregator, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        else:
            model = FullyShardedDataParallel(aggregator, device_id=torch.device("cpu"))
        assert_same(model, own)


@pytest.mark.parametrize("kind", [Aggregator, RotatedMaps], ids=["whole", "parts"])
def test_copies_and_pickles_of_a_model_around_it(kind: type[Aggregator]) -> None:
    model = Predictor(make_aggregator(kind))
    own = copy.deepcopy(model)
    accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for duplicate in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert list(map(type, duplicate.modules())) == list(map(type, own.modules()))
        assert not any("_catseg_fast_part" in vars(module) for module in duplicate.modules())
        for x, y in zip(duplicate.parameters(), model.parameters(), strict=True):
            assert x is not y
        accelerate(duplicate).restore()


def test_state_dicts_go_both_ways() -> None:
    aggregator, other = make_aggregator(), make_aggregator()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    accelerate(aggregator)
    assert list(aggregator.state_dict()) == list(other.state_dict())
    make_aggregator().load_state_dict(aggregator.state_dict(), strict=True)
    assert_same(aggregator, make_aggregator())
    for assign in (False, True):
        aggregator.load_state_dict(other.state_dict(), strict=True, assign=assign)
        assert_same(aggregator, other)
        aggregator.load_state_dict(make_aggregator().state_dict(), strict=True)
        assert_same(aggregator, make_aggregator())


def test_moves_between_types_layouts_and_modes() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    for move in (
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.half().float(),
        lambda net: net.bfloat16().float(),
        lambda net: net.train().eval(),
        lambda net: net.requires_grad_(False),
        lambda net: net.double().float(),
    ):
        assert_same(move(aggregator), move(own))
    assert acceleration.explain().startswith("the model (aggregator): the engine")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantising_later() -> None:
    aggregator = make_aggregator()
    accelerate(aggregator)
    assert_same(aggregator, make_aggregator())
    torch.ao.quantization.quantize_dynamic(aggregator, {nn.Linear}, inplace=True)
    own = torch.ao.quantization.quantize_dynamic(make_aggregator(), {nn.Linear})
    assert_same(aggregator, own)


def test_two_aggregators_share_layers() -> None:
    first, second = make_aggregator(), make_aggregator()
    second.layers = first.layers
    with torch.no_grad():
        second.head.weight.mul_(2)
    owns = [copy.deepcopy(first), copy.deepcopy(second)]
    accelerations = [accelerate(first), accelerate(second)]
    for aggregator, own in zip((first, second), owns, strict=True):
        assert_same(aggregator, own)
    with torch.no_grad():
        first.layers[0].attention.MLP[0].weight.mul_(-1)
        owns[0].layers[0].attention.MLP[0].weight.mul_(-1)
        owns[1].layers[0].attention.MLP[0].weight.mul_(-1)
    accelerations[0].restore()
    for aggregator, own in zip((first, second), owns, strict=True):
        assert_same(aggregator, own)
    accelerations[1].restore()
    assert list(map(type, second.modules())) == list(map(type, owns[1].modules()))


def test_parts_that_two_aggregators_share() -> None:
    first, second = make_aggregator(RotatedMaps), make_aggregator(RotatedMaps)
    own = make_aggregator(RotatedMaps)
    second.layers = first.layers
    accelerations = [accelerate(first), accelerate(second)]
    assert [part.name for part in accelerations[1].parts if part.refusal is None] == [""]
    assert "layers.0.attention (class layer): the model's own code, because it has an engine already" in (
        accelerations[1].explain()
    )
    image, text, guidance = make_inputs(5, 2)
    batch = [image, image.flip(3)], text[:, :, :1], guidance
    for acceleration in (None, *accelerations[::-1]):
        if acceleration is not None:
            acceleration.restore()
        with torch.no_grad():
            for aggregator in (first, second, first, second):
                assert_equal(aggregator(*batch), own(*batch), "shared")
        layer = type(first.layers[0].attention)
        assert (layer is type(own.layers[0].attention)) == (acceleration is accelerations[0])
    assert list(map(type, second.modules())) == list(map(type, own.modules()))


def test_a_model_and_its_part_share_an_aggregator() -> None:
    aggregator = make_aggregator()
    accelerate(Predictor(aggregator))
    with pytest.raises(InputError, match=r"model: transformer has an engine already"):
        accelerate(Predictor(aggregator))
    assert_same(aggregator, make_aggregator())


def test_restoring_after_changes() -> None:
    aggregator = make_aggregator()
    own = copy.deepcopy(aggregator)
    acceleration = accelerate(aggregator)
    assert_same(aggregator, own)
    for net in (aggregator, own):
        net.layers[0] = Adapted(net.layers[0])
        net.head = nn.Conv2d(16, 1, 3, padding=1)
    own.head.load_state_dict(aggregator.head.state_dict())
    assert_same(aggregator, own)
    removed = aggregator.layers[0]
    aggregator.layers[0] = removed.base
    acceleration.restore()
    acceleration.restore()
    own.layers[0] = own.layers[0].base
    assert list(map(type, aggregator.modules())) == list(map(type, own.modules()))
    assert_same(aggregator, own)
    accelerate(aggregator)
    assert_same(aggregator, own)
