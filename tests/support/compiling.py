"""Compilation of a launch for a GPU that is not present."""

from __future__ import annotations

from typing import Any

import triton

from catseg_fast.kernels.launch.launcher import Launch


def source_of(launch: Launch, target: Any) -> tuple[Any, dict[str, Any]]:
    """Return the source that a launch compiles, and its options.

    Triton itself decides how a launch is specialised: which arguments are constants, and which integers and
    pointers are multiples of 16.

    Args:
        launch: of a kernel that is not in the interpreter; tensors may be on the meta device.
        target: the GPU, `triton.backends.compiler.GPUTarget`.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.constants, **launch.options}
    bound, specialization, _ = bind(*launch.arguments.values(), **given)
    given["debug"] = False
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, signature, constexprs, attrs), dict(parsed.__dict__)


def compile_launch(launch: Launch, target: Any) -> Any:
    """Compile a launch, with the arguments of `source_of`; Triton's cache folder keeps the kernel."""
    source, parsed = source_of(launch, target)
    return triton.compile(source, target=target, options=parsed)
