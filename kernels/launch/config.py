"""The base class of launch configs, and grids of configs for the tuner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True)
class LaunchConfig:
    """A kernel's launch config; each kernel has its own subclass with fields.

    `num_warps`, `num_stages` and `maxnreg` are Triton's options. With `tma`, the kernel reads and writes
    through tensor descriptors. Other fields are sizes.

    Attributes:
        version: version of the kernel, raised when configs that were measured before are of no more use. They
            are then ignored.

    Raises:
        ValueError: if a field is not a positive integer, the number of warps or a size is not a power of two,
            or `tma` is not a bool.
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
        """Return Triton's options, passed besides the kernel's arguments."""
        given = {name: getattr(self, name, None) for name in ("num_warps", "num_stages", "maxnreg")}
        options = {name: value for name, value in given.items() if value is not None}
        return {**options, "enable_fp_fusion": True}


C = TypeVar("C", bound=LaunchConfig)


def grid(config: C, **choices: Sequence[int | bool | None]) -> list[C]:
    """Return the config with every combination of values of some fields."""
    return [
        replace(config, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())
    ]


def default_first(default: C, others: Iterable[C]) -> tuple[C, ...]:
    """Return configs to be timed, without duplicates, the default first."""
    return tuple(dict.fromkeys((default, *others)))
