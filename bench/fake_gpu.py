"""A fake GPU: everything that the host does in a call happens, and nothing is computed.

Tensors are on the meta device, kernels are bound and launched by Triton's own code, and only what would
compile them and hand them to the driver is replaced. So the host's work can be counted and timed without a
GPU. It needs a process of its own, in which Triton's interpreter is off:

    python -m bench.fake_gpu --cases 150:0 847:256

prints, for each case, the kernels and operations of a call, and the host's time per launch in units of an
addition of two small tensors. Operations of PyTorch take longer on the meta device than on a GPU, so that the
time of a whole call means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CAPABILITY = 90
ROUNDS = 30
MEMORY = 2**37  # bytes, as an H200 has

# Operations of PyTorch that start nothing on a GPU.
IDLE = {
    "empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach", "alias", "view",
    "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "as_strided", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "split", "promote_types", "split_with_sizes", "unbind", "unfold",
}  # fmt: skip


@dataclass
class Orders:
    """Work that a GPU was given, by kernel of Triton and by operation of PyTorch."""

    kernels: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.kernels.total() + self.operations.total()


class _Compiled:
    """Stands in for a compiled kernel."""

    function, packed_metadata = 1, ()

    def __init__(self, name: str, orders: Orders) -> None:
        self.name, self._orders = name, orders

    def run(self, *_: object) -> None:
        self._orders.kernels[self.name] += 1

    def launch_metadata(self, *_: object) -> None:
        return None


class _Driver:
    """Stands in for Triton's driver of a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Count(TorchDispatchMode):
    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self._orders = orders

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.rpartition("::")[2]
        if name not in IDLE:
            self._orders.operations[name] += 1
        return op(*args, **(kwargs or {}))


@contextmanager
def fake_gpu(compiles: bool = False) -> Iterator[Orders]:
    """Let Triton launch on the meta device; yields what is launched.

    Args:
        compiles: whether kernels are compiled; the caller then provides what launches them.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from catseg_fast import backend
    from catseg_fast.engine import schedule
    from catseg_fast.engine.engine import Engine
    from catseg_fast.engine.launches import prepared_calls
    from catseg_fast.kernels.launch import checks

    orders = Orders()
    check = checks.check_runnable

    def stand_in(self: Any, key: Any, signature: Any, device: Any, *_: object) -> _Compiled:
        compiled = self.device_caches[device][0][key] = _Compiled(self.__name__, orders)
        return compiled

    modules = [module for module in sys.modules.values() if getattr(module, "check_runnable", None) is check]
    patched = [
        (backend, "why_no_triton", lambda _: None),
        (schedule, "free_bytes", lambda _: MEMORY),
        (schedule, "CROP_CLASSES", {"meta": schedule.CROP_CLASSES["cuda"]}),
        (Tensor, "__bool__", lambda x: x.dtype == torch.bool),  # logits are finite, and no flag is set
        (torch, "is_autocast_enabled", lambda *_: False),  # which knows no "meta"
        (Engine, "_without_autocast", lambda _: nullcontext()),
        *([] if compiles else [(JITFunction, "_do_compile", stand_in)]),
        (prepared_calls, "_same_bits", lambda *_: True),
        *((module, "check_runnable", lambda *_: None) for module in modules),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    driver.set_active(_Driver())
    for owner, name, value in patched:
        setattr(owner, name, value)
    try:
        yield orders
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def make_call(variant: str, classes: int, crops: int, limit: int | None) -> Callable[[], Tensor]:
    """Return a call of a published aggregator in fp16 on the fake GPU."""
    from bench.cases import Case
    from bench.cases import make_call as make

    call = make(Case(variant, classes, crops, torch.float16, limit), "meta")
    call.aggregator.backend = "triton"
    return call


def count(call: Callable[[], object], orders: Orders) -> Orders:
    """Return the work of one call, after the kernels are known."""
    for _ in range(3):
        call()
    orders.kernels.clear()
    orders.operations.clear()
    with _Count(orders):
        call()
    return orders


def seconds(call: Callable[[], object], rounds: int = 10) -> float:
    """Return the least host time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(case: str, variant: str, crops: int, orders: Orders) -> dict[str, Any]:
    """Return the costs of a call for a case such as "847:256": classes, and the best per crop or 0."""
    classes, best = map(int, case.split(":"))
    call = make_call(variant, classes, crops, best or None)
    count(call, orders)
    found = {"kernels": dict(orders.kernels), "operations": dict(orders.operations)}
    total, one = orders.total, torch.ones(4)
    add = seconds(lambda: one + one, 1000)
    (stages,) = call.aggregator.engine._triton.values()  # type: ignore[attr-defined]
    with timed(stages._calls) as spent:
        before = orders.kernels.total()
        for _ in range(ROUNDS):
            call()
        launches = (orders.kernels.total() - before) / ROUNDS
    calls = len(spent) // ROUNDS
    per_launch = sum(min(spent[number::calls]) for number in range(calls)) / launches
    return {
        **found, "total": total, "launch_seconds": per_launch, "launch_adds": per_launch / add,
        "repeated": stages._calls.repeated,
    }  # fmt: skip


@contextmanager
def timed(calls: Any) -> Iterator[list[float]]:
    """Yield the seconds of each prepared call, from its arguments to its last launch."""
    spent: list[float] = []
    owner = type(calls)
    original = owner.__call__

    def call(self: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(self, *arguments)
        finally:
            spent.append(time.perf_counter() - start)

    owner.__call__ = call
    try:
        yield spent
    finally:
        owner.__call__ = original


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="v2-vitl")
    parser.add_argument("--crops", type=int, default=5)
    parser.add_argument(
        "--cases", nargs="+", default=["150:0", "1203:0", "847:256"], metavar="T:N",
        help="classes, and how many of each crop's best are aggregated; 0 for all",
    )  # fmt: skip
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not launched")

    with fake_gpu() as orders, torch.no_grad():
        found = {case: measure(case, options.variant, options.crops, orders) for case in options.cases}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
