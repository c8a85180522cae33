"""Races between programs and between threads, which the interpreter does not show: `support/races.py`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.engine.launches.prepared_calls import PreparedCalls
from catseg_fast.inference.readout import LabelMap, Readout, reader
from catseg_fast.kernels import OPS, load
from catseg_fast.kernels.label_map import merge, update
from catseg_fast.kernels.launch import config_files
from catseg_fast.kernels.launch.capability import CAPABILITIES, assume
from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.kernel import Call, record_calls
from catseg_fast.kernels.launch.op import Random, Sizes
from support import races
from support.engines import make_engine, make_inputs_of
from support.races import Hazard, watch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the detector is in the interpreter")


@triton.jit
def shift_kernel(
    x_ptr, out_ptr, n, LOAD: tl.constexpr, STORE: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy blocks, with a distance between elements that are loaded and stored."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + LOAD, mask=i + LOAD < n, other=0.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + i + STORE, x, mask=i + STORE < n)


@triton.jit
def scratch_kernel(x_ptr, scratch_ptr, out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Reverse a block through memory."""
    i = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + i, tl.load(x_ptr + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + i, tl.load(scratch_ptr + BLOCK - 1 - i))


@triton.jit
def sum_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum all blocks to one, with atomic operations or without."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + i)
    if ATOMIC:
        tl.atomic_add(out_ptr + i, x)
    else:
        tl.store(out_ptr + i, tl.load(out_ptr + i) + x)


@triton.jit
def value_kernel(out_ptr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Store a value, or that of each element, to one address."""
    i = tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.int32) if SAME else i
    tl.store(out_ptr + i * 0, value)


def found(launch: Callable[[], object]) -> set[tuple[str, str]]:
    """Kinds of hazards of a launch, and their arguments."""
    with watch() as hazards:
        launch()
    return {(hazard.kind, hazard.argument) for hazard in hazards}


def shift(x: Tensor, out: Tensor, **constants: Any) -> set[tuple[str, str]]:
    sizes = {"LOAD": 0, "STORE": 0, "BARRIER": False, **constants}
    return found(lambda: shift_kernel[(2,)](x, out, len(x), **sizes, BLOCK=16))


def test_finds_planted_races_between_programs() -> None:
    x = torch.randn(32)
    assert not shift(x, torch.empty(32))
    assert not shift(x, x)
    assert found(lambda: value_kernel[(3,)](x.int(), True, 4)) == {(races.SAME_VALUE, "out_ptr")}
    for atomic in (False, True):
        expected = set() if atomic else {(races.READS, "out_ptr"), (races.WRITES, "out_ptr")}
        out = torch.zeros(16)
        assert found(lambda out=out, atomic=atomic: sum_kernel[(2,)](x, out, atomic, 16)) == expected
        assert torch.allclose(out, x.view(2, 16).sum(dim=0))
    assert shift(x, x, LOAD=16, BARRIER=True) == {(races.READS, "x_ptr, out_ptr")}
    assert shift(x, x, STORE=16, BARRIER=True) == {(races.READS, "x_ptr, out_ptr")}


def test_finds_planted_races_between_threads() -> None:
    x = torch.randn(16)
    for barrier in (False, True):
        expected = set() if barrier else {(races.READ_AFTER_WRITE, "scratch_ptr")}
        scratch, out = torch.empty(16), torch.empty(16)
        assert found(lambda s=scratch, o=out, b=barrier: scratch_kernel[(1,)](x, s, o, b, 16)) == expected
        expected = set() if barrier else {(races.WRITE_AFTER_READ, "x_ptr, out_ptr")}
        assert shift(torch.randn(16), x, LOAD=1, BARRIER=barrier) == set()
        assert shift(x, x, LOAD=1, BARRIER=barrier) == expected
    assert found(lambda: value_kernel[(1,)](x.int(), False, 4)) == {(races.ELEMENTS, "out_ptr")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_finds_planted_accesses_out_of_bounds(dtype: torch.dtype) -> None:
    whole = torch.randn(48, dtype=dtype)
    x, out = whole[16:], torch.empty(32, dtype=dtype)
    assert not shift(x[:31], out)  # the last element is masked
    launch = shift_kernel[(2,)]
    sizes = {"LOAD": 0, "STORE": 0, "BARRIER": False, "BLOCK": 16}
    assert found(lambda: launch(x[:31], out, 32, **sizes)) == {(races.OUT_OF_BOUNDS, "")}
    assert found(lambda: launch(x, out[1:], 32, **sizes)) == {(races.OUT_OF_BOUNDS, "")}
    assert found(lambda: launch(x, out, 32, **{**sizes, "LOAD": -1})) == {(races.OUT_OF_BOUNDS, "")}


# Also those that only the GPU's kernels of the decoder, which need whole tiles, compute.
SMALL = {
    "embed_cost_volume": (
        Sizes(1, 3, 5, 6, channels=16, features=20, guided=False),
        Sizes(2, 3, 3, 4, channels=7, features=9, prompts=3),
    ),
    "window_block": (
        Sizes(2, 2, 2, 4, channels=32, heads=2, window=2, shift=1, hidden=48),
        Sizes(1, 1, 3, 6, channels=48, heads=3, window=3, hidden=17, guided=False),
    ),
    "class_collect": (
        Sizes(2, 7, 2, 3, channels=32, heads=2, streamed=True),
        Sizes(1, 33, 3, 3, channels=48, heads=3, pooling=(2, 2), guided=False),
    ),
    "class_apply": (
        Sizes(2, 7, 2, 3, channels=32, heads=2, hidden=48),
        Sizes(1, 64, 1, 2, channels=64, heads=2, hidden=64, guided=False),
        Sizes(1, 3, 3, 3, channels=48, heads=3, hidden=17, pooling=(2, 2)),
    ),
    "decode": (
        Sizes(1, 1, 8, 8, channels=16, decoder=(16, 16), guided=False),
        Sizes(2, 1, 2, 3, channels=9, decoder=(6, 12), group=3),
    ),
    "update_label_map": (Sizes(5, 1, 2, 2), Sizes(1, 2, 2, 2)),
}
DECLARED = {name: load(name) for name in OPS}


@pytest.fixture
def small_programs(default_configs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels have as many programs as on a GPU."""
    monkeypatch.setattr(update, "default_config", lambda device: update.UpdateConfig())
    monkeypatch.setattr(merge, "default_config", lambda device: merge.MergeConfig())


def run(name: str, sizes: Sizes, dtype: torch.dtype, in_place: bool = False) -> list[Tensor]:
    """Results of an op."""
    inputs = DECLARED[name].make_inputs(sizes, Random(dtype, torch.device("cpu")))
    options: dict[str, Any] = {}
    if in_place and name in ("window_block", "class_apply"):
        options["out"] = inputs["x"]
    elif in_place and name == "decode":
        B, t = sizes.state[:2]
        options["out"] = torch.zeros(B, t + 2, 4 * sizes.height, 4 * sizes.width)[:, 1 : t + 1]
        options["flag"] = torch.zeros(1, dtype=torch.int32)
    out = DECLARED[name].triton(**inputs, **options)
    return list(out) if isinstance(out, tuple) else [out]


def dangerous(hazards: list[Hazard]) -> list[Hazard]:
    """Leave out what has the same result in any order: programs of the decoder's head that set one flag."""
    return [x for x in hazards if x.kind != races.SAME_VALUE or x.argument != "flag_ptr"]


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.usefixtures("small_programs")
def test_ops_have_no_hazards_and_the_same_bits_in_any_order(name: str, in_place: bool) -> None:
    if in_place and name not in ("window_block", "class_apply", "decode"):
        pytest.skip("it has no destination")
    orders = (lambda n: np.arange(n)[::-1], np.random.default_rng(0).permutation)
    for sizes, order in zip(SMALL[name], itertools.cycle(orders)):
        expected = run(name, sizes, torch.float16, in_place)
        with watch(order) as hazards:
            out = run(name, sizes, torch.float16, in_place)
        assert not dangerous(hazards)
        assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))


@pytest.mark.usefixtures("small_programs")
def test_programs_of_the_head_set_one_flag() -> None:
    """They write the same value, if any."""
    inputs = DECLARED["decode"].make_inputs(SMALL["decode"][1], Random(torch.float16, torch.device("cpu")))
    inputs["x"][0, 0, 0, 0] = torch.nan
    flag = torch.zeros(1, dtype=torch.int32)
    with watch() as hazards:
        DECLARED["decode"].triton(**inputs, flag=flag)
    assert flag == 1
    assert not dangerous(hazards)


@pytest.mark.usefixtures("small_programs")
def test_costs_of_one_prompt_need_their_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads its scratch memory by other threads than those that wrote it."""
    monkeypatch.setattr(races._Launch, "wait", lambda self: None)
    with watch() as hazards:
        run("embed_cost_volume", Sizes(1, 3, 5, 6, channels=16, features=20), torch.float16)
    assert (races.READ_AFTER_WRITE, "cost_ptr") in {(x.kind, x.argument) for x in hazards}


@torch.no_grad()
@pytest.mark.parametrize("policy", ["resident", pytest.param("recompute", marks=pytest.mark.slow)])
def test_a_call_has_no_hazards(policy: str) -> None:
    """Several chunks, the best classes per crop, and a label map."""
    engine = make_engine(
        window_size=2, feature_resolution=(2, 2), pooling_size=(2, 1), num_layers=1, pad_len=0
    )
    engine.precision, engine.policy, engine.chunk = torch.float16, policy, 2
    image, text, guidance = make_inputs_of(engine.aggregator, 3, 2)
    few = [x[..., : x.shape[-2] // 4, : x.shape[-1] // 6] for x in (image, *guidance)]
    target = LabelMap((25, 30), image.device)
    read = reader(Readout((25, 30)), target, "triton")
    with watch(np.random.default_rng(0).permutation) as hazards:
        logits = engine.logits(few[0], text, few[1:], 2)
        for start in (0, 2):
            read(slice(start, start + 2), logits[:1, start : start + 2])
    assert not dangerous(hazards)
    assert logits.isfinite().any()


@torch.no_grad()
@pytest.mark.usefixtures("small_programs")
def test_repeated_launches_that_share_buffers_have_no_hazards() -> None:
    """No buffer of a launch overlaps another one."""
    sizes = Sizes(1, 1, 1, 2, channels=16, decoder=(16, 16))
    inputs = DECLARED["decode"].make_inputs(sizes, Random(torch.float16, torch.device("cpu")))
    x, calls = inputs.pop("x"), PreparedCalls()

    def decode(x: Tensor) -> Tensor:
        out: Tensor = DECLARED["decode"].triton(x, **inputs)
        return out

    with watch(np.random.default_rng(0).permutation) as hazards:
        results = [calls("decode", decode, x) for _ in range(3)]
    assert calls.repeated == 1
    assert not dangerous(hazards)
    assert torch.equal(results[2], results[0])


# Sizes of every kernel, some of which fit a tile.
CLASSES = (1, 2, 3, 7, 33, 64, 65)
SWEEP = {
    "embed_cost_volume": [
        Sizes(B, t, *HW, channels=C, features=F, prompts=P, guided=B > 1)
        for B, t, HW, C, F, P in (
            *((1, t, (3, 4), 16, 16, 1) for t in CLASSES), *((2, t, (2, 3), 7, 9, 3) for t in (1, 2, 33)),
            (2, 3, (9, 10), 40, 70, 1), (1, 2, (5, 8), 32, 64, 5), (3, 1, (2, 2), 130, 32, 1),
        )
    ],
    "window_block": [
        Sizes(B, t, *HW, channels=C, heads=heads, window=window, shift=shift, hidden=M, guided=B > 1)
        for shift in (0, 1)
        for B, t, HW, C, heads, window, M in (
            *((1, t, (2, 4), 16, 1, 2, 16) for t in CLASSES),
            *((2, t, (3, 6), 48, 3, 3, 17) for t in (1, 3, 7)),
            (2, 2, (10, 5), 64, 2, 5, 80), (3, 1, (8, 8), 32, 2, 8, 32),
        )
    ],
    "class_collect": [
        Sizes(B, t, 2, 3, channels=C, heads=heads, pooling=pooling, streamed=t % 2 == 0, guided=B > 1)
        for pooling in ((1, 1), (2, 2))
        for B, t, C, heads in (
            *((1, t, 32, 2) for t in CLASSES), *((2, t, 48, 3) for t in (1, 3, 33)), (2, 5, 160, 5),
        )
    ],
    "class_apply": [
        Sizes(B, t, 2, 3, channels=C, heads=heads, hidden=M, pooling=pooling, guided=B > 1)
        for pooling in ((1, 1), (2, 2))
        for B, t, C, heads, M in (
            *((1, t, 32, 2, 64) for t in CLASSES),
            *((2, t, 48, 3, 17) for t in (1, 3, 33)),
            (2, 5, 160, 5, 64),
        )
    ],
    "decode": [
        *(Sizes(1, t, 1, 2, channels=16, decoder=(16, 16), guided=False) for t in CLASSES),
        *(Sizes(2, t, 3, 2, channels=9, decoder=(6, 12), group=3) for t in (1, 3)),
        Sizes(2, 2, 8, 8, channels=32, decoder=(32, 16)),
    ],
    "update_label_map": [*(Sizes(5, t, 2, 3) for t in (1, 3, 33)), *(Sizes(1, t, 3, 2) for t in CLASSES)],
}  # fmt: skip


def tried(call: Call) -> list[LaunchConfig]:
    """The configs of a kernel's call on all GPUs, without those that differ in scheduling only."""
    kernel, problem = call.kernel, call.problem
    found = [config for capability in CAPABILITIES for config in kernel.candidates(capability, problem)]
    for path in config_files.SHIPPED.glob(f"*/{problem.op}.json"):
        entries = json.loads(path.read_text())
        found += [problem.config(**x["config"]) for x in entries if x["kernel"] == problem.kernel]
    plain = {"num_stages": 1, "maxnreg": None}
    names = {field.name for field in fields(problem.config)}
    same = {name: value for name, value in plain.items() if name in names}
    return list(dict.fromkeys(replace(config, **same) for config in found))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 86, 90])  # 89 and 100 have the kernels of 86 and 90
@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(name, sizes, id=f"{name}-{i}") for name in OPS for i, sizes in enumerate(SWEEP[name])],
)
@pytest.mark.usefixtures("small_programs")
def test_every_config_has_no_hazards(name: str, sizes: Sizes, capability: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    with assume(capability):
        with watch(generator.permutation) as hazards, record_calls() as calls:
            run(name, sizes, dtype)
        assert not dangerous(hazards)
        with watch(generator.permutation) as hazards:
            run(name, sizes, dtype, in_place=True)
        assert not dangerous(hazards)
        for call in calls if capability == 90 else ():  # with the configs of all capabilities
            for config in tried(call):
                expected = call.copy().run(config)
                with watch(generator.permutation) as hazards:
                    found = call.copy().run(config)
                assert not dangerous(hazards), config
                pairs = zip(call.compared(found), call.compared(expected), strict=True)
                assert all(torch.equal(*pair) for pair in pairs), config
