"""Triton's own driver of NVIDIA GPUs on a CUDA library whose launches do nothing: `fake_libcuda.c`.

Everything between a kernel's call in Python and the CUDA driver runs as on a GPU: Triton's launcher in
Python, and its launcher in C, which packs the arguments. It needs a C compiler, as Triton does, and a process
that has no CUDA driver of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

SOURCE = Path(__file__).with_name("fake_libcuda.c")
FOLDER = Path(nvidia.__file__).parent


class Function(ctypes.Structure):
    """A kernel of the fake library."""

    _fields_ = [("count", ctypes.c_int32), ("bytes", ctypes.c_int32 * 64)]


@cache
def load_library() -> ctypes.CDLL:
    """Build and load the fake CUDA library; Triton links to it from then on.

    Raises:
        RuntimeError: if there is no C compiler.
    """
    import torch
    import triton

    torch.cuda.is_available()  # the CUDA runtime looks for a driver once, and must not find this one
    folder = Path(tempfile.mkdtemp(prefix="fake-libcuda-"))
    path = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-shared", "-fPIC", f"-I{FOLDER / 'include'}", "-Wl,-soname,libcuda.so.1"]
    try:
        subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"fake libcuda: {compiler}: {getattr(error, 'stderr', error)}") from error
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # later loads of this name find it
    library.fake_launches.restype = library.fake_log.restype = ctypes.c_uint64
    library.fake_log.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    (folder / "libcuda.so").symlink_to(path)
    triton.knobs.nvidia.libcuda_path = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    return library


class Driver:
    """Triton's driver, on the fake library."""

    def __init__(self, capability: int) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
        from triton.runtime import driver

        load_library()
        self.capability, self.launcher_cls = capability, CudaLauncher
        self.utils: Any = None
        driver.set_active(self)
        self.utils = CudaUtils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: int) -> None:
        return None

    def compiled(self, kernel: Any, signature: Any, constants: Any, attributes: Any, options: Any) -> Any:
        """Return what stands in for a compiled kernel: a real launcher and a function that does nothing."""
        from triton.compiler import ASTSource

        source = ASTSource(kernel, signature, constants, attributes)
        maps = [_tensor_map(kind) for kind in signature.values() if kind.startswith("tensordesc")] or None
        metadata = SimpleNamespace(
            num_ctas=1, num_warps=options.num_warps, shared=0, tensordesc_meta=maps, instrumentation_mode="",
            global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False,
        )  # fmt: skip
        launcher = self.launcher_cls(source, metadata)
        sizes = _bytes_of(signature, maps)
        function = Function(len(sizes), (ctypes.c_int32 * 64)(*sizes))
        return SimpleNamespace(
            name=kernel.__name__, run=launcher, function=ctypes.addressof(function), keep=function,
            packed_metadata=(options.num_warps, 1, 0), metadata=metadata, src=source,
            launch_metadata=lambda *_: None,
        )  # fmt: skip


@contextmanager
def fake_launches(capability: int = 90) -> Iterator[ctypes.CDLL]:
    """Let kernels take tensors on the CPU, and launch them on the fake library, which is yielded."""
    from triton.runtime.jit import JITFunction

    from catseg_fast import backend, kernels
    from catseg_fast.engine.launches import prepared_calls
    from catseg_fast.kernels.launch import checks

    for name in kernels.OPS:
        kernels.load(name)
    driver = Driver(capability)

    def compile_nothing(
        kernel: Any,
        key: Any,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        _: Any,
    ) -> Any:
        compiled = driver.compiled(kernel, signature, constants, attributes, options)
        kernel.device_caches[device][0][key] = compiled
        return compiled

    check = checks.check_runnable
    modules = [module for module in sys.modules.values() if getattr(module, "check_runnable", None) is check]
    with ExitStack() as stack:
        for owner, name, value in (
            (backend, "why_no_triton", lambda _: None),
            (JITFunction, "_do_compile", compile_nothing),
            (prepared_calls, "_same_bits", lambda *_: True),
            *((module, "check_runnable", lambda *_: None) for module in modules),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield load_library()


def _tensor_map(kind: str) -> dict[str, Any]:
    """Return what the compiler says of a parameter such as "tensordesc<fp16[1,10,64]>"."""
    block = [int(size) for size in kind.split("[")[1].split("]")[0].split(",")]
    return {"swizzle": 0, "elem_size": 2, "elem_type": 6, "block_size": block, "fp4_padded": False}


def _bytes_of(signature: Any, maps: Any) -> list[int]:
    """Return the bytes of each parameter of a kernel with Triton's signature."""
    from triton.backends.driver import expand_signature

    sizes = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8, "nvTmaDesc": 128}
    types = expand_signature(signature.values(), maps, "nvTmaDesc")
    return [8 if kind[0] == "*" else sizes[kind] for kind in types if kind != "constexpr"]
