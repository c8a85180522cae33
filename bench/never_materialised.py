"""Tensors of the reference that the Triton kernels never write to memory, with their sizes.

`python -m bench.never_materialised` runs the reference on the meta device, where tensors have shapes and no
memory, and the Triton back end, whose outputs are allocated but whose kernels are not launched, both at full
size. It needs no GPU, and writes bench/results/never_materialised.md.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # otherwise the kernels refuse tensors on a CPU

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, make_call
from catseg_fast import reference
from catseg_fast.engine.schedule import format_bytes, usual_chunk
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.files import write_text
from catseg_fast.kernels.launch.launcher import record

RECORD = Path(__file__).parent / "results" / "never_materialised.md"
CROPS = 5
FEW, MANY = 150, 1200  # classes
CHUNK = usual_chunk(MANY, CROPS, torch.device("cuda"))
SMALLEST = 2**20  # bytes of the tensors that are listed

# Part of the reference (a prefix of the module's name) to the stage that takes its place.
PARTS = {"swin_block": "window_block", "attention": "class_attention", "decoder": "decode", "head": "decode"}
STAGES = ("embed_cost_volume", "window_block", "class_attention", "decode")

Shape = tuple[int, ...]


class Recorder(TorchDispatchMode):
    """Shapes of the new tensors that operations write, by stage."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.stage = STAGES[0]
        self.written: list[tuple[str, str, Shape]] = []  # stage, operation, shape
        for name, module in model.named_modules():
            *parents, own = name.split(".")
            stage = next((stage for part, stage in PARTS.items() if own.startswith(part)), None)
            if stage is not None and "attention" not in parents[-1:]:
                module.register_forward_pre_hook(lambda *_, stage=stage: setattr(self, "stage", stage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = func._schema.name == "aten::_unsafe_view" or any(x.alias_info for x in func._schema.returns)
        if not is_view:  # and not in place
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    operation = func._schema.name.removeprefix("aten::").strip("_")
                    self.written.append((self.stage, operation, tuple(x.shape)))
        return out


def of_the_reference(variant: str, classes: int) -> list[tuple[str, str, Shape]]:
    """List the tensors that the reference writes, in order."""
    case = make_call(Case(variant, 1, 1))
    model = case.aggregator.to("meta")
    model.max_classes = None
    inputs = [torch.empty(CROPS, *x.shape[1:], device="meta") for x in (case.img_feats, *case.guidance)]
    text = torch.empty(CROPS, classes, *case.text_feats.shape[2:], device="meta")
    with torch.no_grad(), Recorder(model) as recorder:
        reference.Aggregator.forward(model, inputs[0], text, inputs[1:])
    return recorder.written


def of_the_kernels(variant: str) -> dict[str, set[Shape]]:
    """List the allocations of the Triton stages for a chunk, by stage."""
    call = make_call(Case(variant, 2 * CHUNK, CROPS))
    engine = call.aggregator.engine
    engine.backend, engine.policy, engine.chunk = "triton", "recompute", CHUNK
    engine.precision = torch.float16
    shapes: dict[str, set[Shape]] = {stage: set() for stage in STAGES}
    run, new_empty = TritonStages._run, Tensor.new_empty
    stage = STAGES[0]

    def entering(self: TritonStages, name: str, *arguments: Any) -> Any:
        nonlocal stage
        stage = name
        return run(self, name, *arguments)

    def recording(x: Tensor, size: Any, **options: Any) -> Tensor:
        shapes[stage].add(tuple(size))
        return new_empty(x, size, **options)

    def stop(*_: Any) -> None:
        raise StopIteration  # all stages have had a chunk

    with (
        suppress(StopIteration),
        torch.no_grad(),
        record(execute=False),
        mock.patch.object(TritonStages, "_run", entering),
        mock.patch.object(Tensor, "new_empty", recording),
    ):
        vocabulary = engine.vocabulary(call.text_feats, None)
        engine.stream(call.img_feats, vocabulary, call.guidance, None, lambda: stop)
    return shapes


def table(variant: str) -> list[str]:
    """Return the table of one variant in Markdown."""
    few = {(stage, _bytes(shape)) for stage, _, shape in of_the_reference(variant, FEW)}
    found: dict[tuple[str, Shape], dict[str, None]] = {}
    for stage, operation, shape in of_the_reference(variant, MANY):
        if _bytes(shape) >= SMALLEST:
            found.setdefault((stage, shape), {})[operation] = None
    lines = []
    for stage, ours in of_the_kernels(variant).items():
        lines += [
            f"### {stage}",
            "",
            f"| the reference writes | by | T={FEW} | T={MANY} |",
            "|---|---|---:|---:|",
        ]
        rows = [(shape, operations) for (of, shape), operations in found.items() if of == stage]
        for shape, operations in sorted(rows, key=lambda row: -_bytes(row[0])):
            size = _bytes(shape)
            small = next((n for n in (size * FEW // MANY, size) if (stage, n) in few), None)
            sizes = f"{format_bytes(small) if small else ''} | {format_bytes(size)}"
            lines.append(f"| {list(shape)} | {', '.join(operations)} | {sizes} |")
        written = [
            f"{list(shape)} ({format_bytes(_bytes(shape, 2))})"
            for shape in sorted(ours, key=lambda shape: -_bytes(shape, 2))
            if _bytes(shape, 2) >= SMALLEST
        ]
        lines += ["", f"The kernels write, for each chunk, whatever T is: {', '.join(written)}.", ""]
    return lines


def _bytes(shape: tuple[int, ...], item: int = 4) -> int:
    return torch.Size(shape).numel() * item


def main() -> None:
    """The program."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = [
        "# Tensors that are never materialised",
        "",
        f"Tensors of {format_bytes(SMALLEST)} or more: the reference's in fp32 for {CROPS} crops, shapes at "
        f"T={MANY}; the Triton kernels' in fp16, for {CHUNK} classes per step. Made by "
        "`python -m bench.never_materialised`; nothing is run on a GPU for it.",
    ]
    for variant in ("v1-vitl-swinb", "v2-vitl"):
        lines += ["", f"## {variant}", "", *table(variant)]
    write_text(RECORD, "\n".join(lines).rstrip() + "\n")
    print(f"written: {RECORD}")


if __name__ == "__main__":
    main()
