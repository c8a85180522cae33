"""A launch's compilation without the launch: for a GPU that need not be there."""

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
    """What `kernel[grid](*arguments, **constants, **options)` compiles, and the options of the compiler.

    Triton itself says how a launch is specialised: what is a constant, and which integers and pointers are
    multiples of 16.

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
    """The compiled kernel of a launch; arguments as of `source_of`. It is kept in Triton's cache folder."""
    source, parsed = source_of(kernel, arguments, constants, options, target)
    return triton.compile(source, target=target, options=parsed)
