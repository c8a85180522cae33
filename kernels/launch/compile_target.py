"""What a kernel module says of its kernels, so that they can be compiled without a GPU.

A module has a function

    def compile_targets(capability: int) -> list[CompileTarget]: ...

that lists every kernel it launches, at each default config that it ships for GPUs of that compute capability
(80, 86, 89, 90, 100). `tests/test_compile_targets.py` finds the function by itself, compiles the list, and
fails on what a `CompileTarget` does not allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Compute capabilities for which default configs are shipped.
CAPABILITIES = (80, 86, 89, 90, 100)


@dataclass(frozen=True)
class CompileTarget:
    """One kernel at one launch config, for one compute capability.

    Attributes:
        name: unique in the module, e.g. "class_apply fp16".
        kernel: the `@triton.jit` function.
        signature: type of each runtime argument by name, e.g. {"x_ptr": "*fp16", "classes": "i32"}.
        constexprs: value of each `tl.constexpr` argument by name; together with `signature`, all arguments.
        num_warps, num_stages, maxnreg: as at launch.
        divisible: integer arguments that are multiples of 16 in real calls, as strides are; pointers always
            are. An integer argument that is 1 in real calls belongs in `constexprs`, as a launch has it.
        expects_mma: the matrix instruction that must come out: "mma" for any kind, "wgmma" or "tcgen05".
        max_stack: bytes of stack that are accepted. They may hold spills outside loops alone; spills in a
            loop never pass.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    divisible: tuple[str, ...] = ()
    expects_mma: str | None = None
    max_stack: int = 0


def capability_of(device: torch.device) -> int:
    """The capability whose default configs run on a device; in the interpreter, which takes any, H100's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in CAPABILITIES if known <= 10 * major + minor), default=CAPABILITIES[0])
