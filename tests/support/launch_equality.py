"""Prepared launches against ordinary ones, in random settings, with kernels that only mix bytes.

Each kernel is replaced by one that reads everything that the kernel may read, mixes it with its name, grid
and numbers, and writes random numbers that follow from that wherever the kernel writes. It takes its
arguments from Triton's launcher, as a compiled kernel does: tensors in an ordinary launch, addresses in a
prepared one. A wrong address, number or grid, a buffer that is overwritten too early, or launches of another
call therefore change the result. Compared with Triton's interpreter, this tests less of the kernels, which
compute nothing, but more of the launches: real addresses go through the same code as on a GPU, and some
hundred times as many launches are tested per second.

    python -m support.launch_equality --settings 500 --seed 0

needs a process in which Triton's interpreter is off.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from catseg_fast import backend, kernels
from catseg_fast.engine.engine import Engine
from catseg_fast.inference.readout import LabelMap, Readout, TopClasses, reader
from catseg_fast.kernels.launch import checks
from support.aggregators import PUBLISHED, make_aggregator

CALLS = 5  # ordinary, prepared, compared, and two repeated

# The arguments that a kernel writes, by file and name; those with "&" it also reads. A missing kernel is an
# error. A missing output stays as it was allocated, and an additional one overwrites weights: both change
# the result.
WRITTEN = {
    "apply.apply_kernel": ("out_ptr",),
    "attention.attention_kernel": ("&qkv_ptr",),
    "boxes.boxes_kernel": ("out_ptr", "statistics_ptr"),
    "collect.collect_kernel": ("key_value_ptr", "key_sum_ptr"),
    "convolution.convolution_kernel": ("out_ptr",),
    "cost.cost_kernel": ("cost_ptr",),
    "group_norm.merge_kernel": ("norm_ptr", "&map_ptr"),
    "merge.merge_kernel": ("out_ptr",),
    "mlp.project_mlp_kernel": ("out_ptr",),
    "patches.patches_kernel": ("out_ptr", "statistics_ptr"),
    "qkv.qkv_kernel": ("qkv",),
    "row_phases.row_phases_kernel": ("out_ptr", "statistics_ptr"),
    "rows.rows_kernel": ("out_ptr", "statistics_ptr"),
    "single_prompt.single_prompt_kernel": ("cost_ptr", "out_ptr"),
    "unpool.unpool_kernel": ("out_ptr",),
    "update.update_kernel": ("new_scores_ptr", "new_labels_ptr"),
}

Region = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# From ordinary launches, which have tensors: which arguments are tensors, by kernel, and their regions.
_tensors: dict[str, set[str]] = {name: set() for name in WRITTEN}
_regions: dict[object, dict[str, Region]] = {}


class MixingKernel:
    """Stands in for a compiled kernel, behind Triton's launcher in Python."""

    def __init__(self, kernel: Any) -> None:
        self.name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        self.names = kernel.arg_names
        self.written = WRITTEN[self.name]

    def __call__(self, *arguments: Any) -> None:
        grid, values = arguments[:3], dict(zip(self.names, arguments[-1], strict=True))
        tensors = {name: x for name, value in values.items() if (x := _tensor(value)) is not None}
        _tensors[self.name].update(tensors)
        places = {name: x for name, x in values.items() if name in _tensors[self.name] and x is not None}
        numbers = tuple((name, x) for name, x in values.items() if name not in places)
        key = (self.name, grid, repr(numbers))
        if len(tensors) == len(places):
            _regions[key] = {name: (tuple(x.shape), x.stride(), x.dtype) for name, x in tensors.items()}
        assert key in _regions, f"{self.name}: no ordinary launch had this grid and these numbers"
        views = {name: _view(_address(x), *_regions[key][name]) for name, x in places.items()}
        digest = hashlib.blake2b(repr(key).encode())
        outputs = [name.strip("&") for name in self.written]
        for name, view in views.items():
            if name not in self.written:
                digest.update(_bytes(view).numpy().data)
        for name in outputs:
            if name in views:
                seed = int.from_bytes(hashlib.blake2b(digest.digest() + name.encode()).digest()[:8], "little")
                _fill(views[name], seed)


def _tensor(x: Any) -> Tensor | None:
    base = getattr(x, "base", x)
    return base if isinstance(base, Tensor) else None


def _address(x: Any) -> int:
    if isinstance(x, int):
        return x
    address: int = getattr(x, "base", x).data_ptr()
    return address


def _view(address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor at an address."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    buffer = (ctypes.c_uint8 * ((last + 1) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, stride)


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _fill(view: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if view.dtype.is_floating_point:
        view.copy_(torch.rand(view.shape, generator=generator) * 2 - 1)
    else:
        view.copy_(torch.randint(0, 100, view.shape, generator=generator))


class Driver:
    """A driver of Triton whose kernels mix bytes."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(launch=None, build_signature_metadata=lambda signature: b"")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def allocate_default_profile_scratch(self, *_: Any) -> None:
        return None


def _compile_nothing(kernel: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
    constants, _, attributes, _ = rest
    metadata = SimpleNamespace(
        num_ctas=1, tensordesc_meta=None, instrumentation_mode="", launch_cooperative_grid=False,
        launch_pdl=False, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1,
    )  # fmt: skip
    plain = {name: "i32" if kind.startswith("tensordesc") else kind for name, kind in signature.items()}
    launcher = CudaLauncher(ASTSource(kernel, plain, constants, attributes), metadata)
    launcher.launch = MixingKernel(kernel)
    compiled = SimpleNamespace(
        run=launcher, function=0, packed_metadata=(4, 1, 0), launch_metadata=lambda *_: None
    )
    kernel.device_caches[device][0][key] = compiled
    return compiled


@contextmanager
def mixing_kernels() -> Iterator[None]:
    """Let kernels take tensors on the CPU and mix their bytes, for the rest of the process."""
    import sys

    assert not checks.INTERPRETED, "TRITON_INTERPRET is set: interpreted kernels are not launched"
    driver.set_active(Driver())
    from triton.backends.nvidia import driver as nvidia

    nvidia.annotate_arguments = lambda signature: []
    nvidia.make_kernel_signature = lambda signature: b""
    for name in kernels.OPS:
        kernels.load(name)
    check = checks.check_runnable
    for module in list(sys.modules.values()):
        if getattr(module, "check_runnable", None) is check:
            module.check_runnable = lambda *_: None  # type: ignore[attr-defined]
    backend.why_no_triton = lambda _: None  # type: ignore[assignment]
    JITFunction._do_compile = _compile_nothing
    yield


class Setting:
    """A random engine and call."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.classes, self.crops = draw.randint(1, 24), draw.choice([1, 1, 2, 5])
        self.side = draw.choice([12, 12, 24]) if self.crops < 5 else 12
        self.chunk = draw.choice([None, 1, 2, draw.randint(1, self.classes), self.classes])
        self.policy = draw.choice([None, "resident", "recompute"])
        self.limit = draw.choice([None, None, draw.randint(1, self.classes)])
        self.top_k = draw.choice([None, None, 1, 3])
        self.dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
        self.pooling = draw.choice([(1, 1), (2, 2), (6, 6)])
        self.prompts = draw.choice([1, 1, 3])
        self.layers = draw.choice([1, 2])
        self.guided = draw.random() < 0.8
        self.seed = seed

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    def engine(self) -> Engine:
        aggregator = make_aggregator(
            prompt_channel=self.prompts, pooling_size=self.pooling, num_layers=self.layers, **PUBLISHED
        ).float()
        engine = Engine(aggregator)
        engine.backend, engine.precision, engine.graphs = "triton", self.dtype, "off"
        engine.chunk, engine.policy = self.chunk, self.policy
        return engine

    def inputs(self, call: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + call)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        maps: list[Tensor | None] = [
            draw(self.crops, c, k * self.side, k * self.side) for c, k in ((20, 1), (12, 2), (10, 4))
        ]
        text = draw(1, self.classes, self.prompts, 24)
        return draw(self.crops, 24, self.side, self.side), text, maps if self.guided else [None, None, None]


@torch.no_grad()
def answer(engine: Engine, setting: Setting, call: int) -> list[Tensor]:
    """Return all logits of a call, or its labels and scores, as bytes."""
    image, text, guidance = setting.inputs(call)
    if setting.top_k is None:
        return [engine.logits(image, text.expand(setting.crops, -1, -1, -1), guidance, setting.limit)]
    vocabulary = engine.vocabulary(text, setting.limit)
    size, cpu = (30, 40), torch.device("cpu")
    target: Any = LabelMap(size, cpu) if setting.top_k == 1 else TopClasses(setting.top_k, size, cpu)
    readout = Readout(size)

    def begin() -> Any:
        consume = reader(readout, target, "triton")
        return lambda classes, logits: consume(classes, logits[-1:])

    engine.stream(image, vocabulary, guidance, setting.limit, begin)
    return [target.scores, target.labels]


def compare(setting: Setting) -> int:
    """Compare an engine's calls with those of one that prepares nothing; return the number of repeated calls.

    Raises:
        AssertionError: if they differ by a bit.
    """
    from catseg_fast.engine.triton_stages import TritonStages

    ordinary, prepared = setting.engine(), setting.engine()
    with torch.no_grad():
        plain = ordinary.stages(ordinary.plan())
    assert isinstance(plain, TritonStages)
    plain._calls = None
    for call in range(CALLS):
        pairs = zip(answer(ordinary, setting, call), answer(prepared, setting, call), strict=True)
        for expected, actual in pairs:
            assert torch.equal(_bytes(expected), _bytes(actual)), f"call {call}: {setting}"
    (stages,) = prepared._triton.values()
    assert stages._calls is not None
    assert stages._calls.repeated, f"nothing was repeated: {setting}"
    return stages._calls.repeated


def make_fault(name: str) -> None:
    """Let prepared launches do something wrong, to check that it is found."""
    from catseg_fast.engine.launches import direct, prepared, prepared_calls

    prepared_calls._same_bits = lambda *_: True  # type: ignore[assignment]  # which would find some at once
    if name == "buffers overlap":
        share = prepared.share
        prepared.share = lambda *arguments: (share(*arguments)[0], dict.fromkeys(share(*arguments)[1], 0))
    else:
        init = direct.DirectLaunch.__init__

        def wrong(self: Any, compiled: Any, grid: Any, *arguments: Any) -> None:
            init(self, compiled, (grid[0] + 1, *grid[1:]), *arguments)

        direct.DirectLaunch.__init__ = wrong  # type: ignore[method-assign]


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first setting; each has the next one")
    parser.add_argument("--fault", choices=["buffers overlap", "wrong grid"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with mixing_kernels():
        if options.fault:
            make_fault(options.fault)
        repeated = sum(
            compare(Setting(seed)) for seed in range(options.seed, options.seed + options.settings)
        )
    print(f"{options.settings} settings, {repeated} repeated calls of kernels: equal")


if __name__ == "__main__":
    main()
