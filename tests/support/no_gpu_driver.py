"""A driver with which Triton compiles for a GPU that is not present; nothing can be launched."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget


class Driver:
    """The functions of a driver that a compilation calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def activate() -> None:
    """Let this process compile for an H200."""
    triton.runtime.driver.set_active(Driver())
