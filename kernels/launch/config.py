"""What every kernel's launch config is, and grids of them for the tuner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched; a kernel's own class has the fields.

    `num_warps`, `num_stages` and, where a kernel has it, `maxnreg` are Triton's; the others are sizes, and
    `tma`, where a kernel has it, says that it reads and writes through tensor descriptors.

    Attributes:
        version: of the kernel; raised when it changes so much that configs which were measured before are of
            no use. They are ignored from then on.

    Raises:
        ValueError: if a field is not a positive integer, or a number of warps or a size no power of two, or
            `tma` no bool.
    """

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "maxnreg":
                continue
            if field.name == "tma":
                if type(value) is not bool:
                    raise ValueError(f"tma: {value!r} is not a bool")
                continue
            any_number = field.name in ("num_stages", "maxnreg")
            if type(value) is not int or value < 1 or (value & (value - 1) and not any_number):
                expected = "a positive integer" if any_number else "a power of two"
                raise ValueError(f"{field.name}: {value!r} is not {expected}")

    @cached_property
    def options(self) -> dict[str, Any]:
        """What Triton is told besides the kernel's arguments."""
        given = {name: getattr(self, name, None) for name in ("num_warps", "num_stages", "maxnreg")}
        options = {name: value for name, value in given.items() if value is not None}
        return {**options, "enable_fp_fusion": True}


C = TypeVar("C", bound=LaunchConfig)


def grid(config: C, **choices: Sequence[int | bool | None]) -> list[C]:
    """The config with every combination of some fields' values."""
    return [
        replace(config, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())
    ]


def default_first(default: C, others: Iterable[C]) -> tuple[C, ...]:
    """Configs to be timed, each once: the default before the others."""
    return tuple(dict.fromkeys((default, *others)))
