"""Predicted time of the aggregator on a GPU on which the current kernels have not run yet.

There are two kinds: computed lower bounds, and sums of kernels that were timed separately on an H200 before
they were rewritten for this package. Each comes from a file in `bench/results/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import markdown, three_digits

CROPS = 5
CALLS = {  # classes that are aggregated per crop
    "T=150": 150,
    "T=847": 847,
    "T=1203": 1203,
    "best 256 of 847": 256,
}


def read_prototypes(folder: Path) -> dict[str, Any]:
    """Return the record of kernels that were timed separately: `bench/results/prototypes.json`."""
    content: dict[str, Any] = json.loads((folder / "prototypes.json").read_text(encoding="utf-8"))
    return content


def unit_milliseconds(prototypes: dict[str, Any], column: str) -> float:
    """Return the milliseconds of all kernels for the record's number of class-crops.

    Args:
        prototypes: the result of `read_prototypes`.
        column: "before" or "prototype".
    """
    return sum(float(kernel["launches"]) * float(kernel[column]) for kernel in prototypes["kernels"])


def call_milliseconds(prototypes: dict[str, Any], column: str, classes: int) -> float:
    """Return the milliseconds of the kernels of a call with `CROPS` crops."""
    units = CROPS * classes / float(prototypes["class_crops"])
    return units * unit_milliseconds(prototypes, column)


def bounds(folder: Path) -> str:
    """Return the lower bounds as a table."""
    content = json.loads((folder / "predicted.json").read_text(encoding="utf-8"))
    return markdown([{"": name, **cells} for name, cells in content["milliseconds"].items()])


def kernels(folder: Path) -> str:
    """Return the kernels that were timed separately, and their sum, as a table."""
    prototypes = read_prototypes(folder)
    rows = [
        {
            "": kernel["kernel"],
            "launches": str(kernel["launches"]),
            "measured at 2c79cdd": f"{kernel['before']:.4f} ms",
            "prototype": f"{kernel['prototype']:.4f} ms",
        }
        for kernel in prototypes["kernels"]
    ]
    total = {
        "": "all",
        "launches": str(sum(kernel["launches"] for kernel in prototypes["kernels"])),
        "measured at 2c79cdd": f"{unit_milliseconds(prototypes, 'before'):.2f} ms",
        "prototype": f"{unit_milliseconds(prototypes, 'prototype'):.2f} ms",
    }
    return markdown([*rows, total])


def calls(folder: Path) -> str:
    """Return the sums of the prototypes' times for whole calls as a table."""
    prototypes = read_prototypes(folder)
    return markdown(
        [
            {
                "": name,
                **{
                    call: f"{three_digits(call_milliseconds(prototypes, column, classes))} ms"
                    for call, classes in CALLS.items()
                },
            }
            for name, column in (
                ("the sum of the kernels at 2c79cdd", "before"),
                ("the sum of the prototypes", "prototype"),
            )
        ]
    )
