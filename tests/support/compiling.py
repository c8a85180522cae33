"""Compilation of a launch for a GPU that is not present."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton


def source_of(
    kernel: Any,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    target: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return the source that `kernel[grid](*arguments, **constants, **options)` compiles, and its options.

    Triton itself decides how a launch is specialised: which arguments are constants, and which integers and
    pointers are multiples of 16.

    Args:
        kernel: the `@triton.jit` function, not in the interpreter.
        arguments: its runtime arguments by name, in order; tensors may be on the meta device.
        constants: its `tl.constexpr` arguments by name.
        options: Triton's options by name.
        target: the GPU, `triton.backends.compiler.GPUTarget`.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**constants, **options}
    bound, specialization, _ = bind(*arguments.values(), **given)
    given["debug"] = False
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, signature, constexprs, attrs), dict(parsed.__dict__)


def compile_launch(
    kernel: Any,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    target: Any,
) -> Any:
    """Compile a launch, with the arguments of `source_of`; Triton's cache folder keeps the kernel."""
    source, parsed = source_of(kernel, arguments, constants, options, target)
    return triton.compile(source, target=target, options=parsed)
