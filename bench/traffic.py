"""Bytes and products of a call's kernels, counted from its launches; no GPU is needed.

    python -m bench.traffic          writes bench/results/traffic.json

The call's launches are listed on the meta device. Each tensor that a launch gets counts once, with all its
elements: the least that a kernel has to move between memory and chip. What it reads again through the L2
cache, such as weights, does not count. Products are those of the engine's maths (`bench.flops`), without the
padding of tiles.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.fake_gpu import fake_gpu, make_call
from bench.flops import flop_table
from bench.tables import markdown, three_digits
from catseg_fast.files import write_text
from catseg_fast.kernels.launch.launcher import Launch, record

RECORD = Path(__file__).parent / "results" / "traffic.json"
VARIANT, CROPS = "v2-vitl", 5
CLASSES = (150, 1203)
OPS = {  # folders in kernels/, and their rows of `flop_table`
    "cost_volume": "cost volume and 7x7 convolution",
    "window_attention": "window attention: guidance once per image",
    "class_attention": "class attention: text guidance once, padding in closed form",
    "decoder": "decoder: phase convolutions, guidance once per image",
}


def kernel_bytes(launch: Launch) -> tuple[str, str, int]:
    """Return the op and the kernel of a launch, and the bytes of its tensors."""
    function = launch.kernel.fn
    op, kernel = function.__module__.split(".")[2], function.__name__.removesuffix("_kernel").strip("_")
    total = 0
    for name, value in launch.arguments.items():
        x = getattr(value, "base", value)  # of tensor descriptors
        if isinstance(x, Tensor):
            part = _border(x) if (kernel, name) == ("merge", "map_ptr") else 1.0
            total += round(part * x.numel() * x.element_size())
    return op, kernel, total


def _border(maps: Tensor) -> float:
    """Return the share of a map `[N, H + 2, W + 2, C]` that is its border."""
    H, W = maps.shape[-3:-1]
    return 1 - (H - 2) * (W - 2) / (H * W)


@torch.no_grad()
def count_bytes(variant: str, classes: int, crops: int) -> dict[str, dict[str, dict[str, int]]]:
    """Return launches and bytes by op and kernel, of a call in fp16 with all classes."""
    with fake_gpu():
        call = make_call(variant, classes, crops, None)
        with record(execute=False, note=kernel_bytes) as launches:
            call()
    counts: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for op, kernel, size in launches:
        counts[op, kernel] += 1
        moved[op, kernel] += size
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (op, kernel), launched in counts.items():
        found.setdefault(op, {})[kernel] = {"launches": launched, "bytes": moved[op, kernel]}
    return found


def roofline(results: Path, matmul_rate: float, copy_rate: float) -> str:
    """Return bytes, products and the least time of each op as a table.

    Args:
        results: folder with `traffic.json`.
        matmul_rate: FLOP/s of a matrix product.
        copy_rate: bytes per second of a copy.
    """
    content = json.loads((results / "traffic.json").read_text(encoding="utf-8"))
    rows = []
    for classes, kernels in content["kernels"].items():
        total = [0.0] * 6
        for op in OPS:
            own = kernels[op].values()
            launches, moved = (sum(kernel[key] for kernel in own) for key in ("launches", "bytes"))
            flop = content["mflop_per_class_crop"][op] * 1e6 * int(classes) * content["crops"]
            memory, products = 1e3 * moved / copy_rate, 1e3 * flop / matmul_rate
            numbers = [launches, moved / 1e9, flop / 1e12, memory, products, max(memory, products)]
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            rows.append(_row(classes, op, numbers))
        rows.append(_row(classes, "all", total))
    return markdown(rows)


def _row(classes: str, op: str, numbers: Sequence[float]) -> dict[str, str]:
    launches, gigabytes, teraflop, memory, products, least = numbers
    return {
        "T": classes,
        "op": op,
        "launches": f"{launches:.0f}",
        "moved": f"{three_digits(gigabytes)} GB",
        "computed": f"{three_digits(teraflop)} TFLOP",
        "memory": f"{three_digits(memory)} ms",
        "products": f"{three_digits(products)} ms",
        "the longer of both": f"{three_digits(least)} ms",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: what is launched then is not what a GPU gets")
    table = {name: ours for name, _, ours in flop_table(Case(VARIANT, 16, 1))}
    content: dict[str, Any] = {
        "note": "v2-vitl, fp16, all classes: bytes of the tensors that kernels get, products of the maths.",
        "crops": CROPS,
        "mflop_per_class_crop": {op: round(table[row], 2) for op, row in OPS.items()},
        "kernels": {str(classes): count_bytes(VARIANT, classes, CROPS) for classes in CLASSES},
    }
    write_text(RECORD, json.dumps(content, indent=1) + "\n")
    print(roofline(RECORD.parent, 748e12, 4.28e12))


if __name__ == "__main__":
    main()
