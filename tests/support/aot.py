"""Compile kernels for GPUs that are not present, and read the resources that they take from the machine code.

The launches of ops are compiled: each op of `catseg_fast.kernels.OPS` is called on the meta device, where its
launches are recorded (`launcher.record`), and specialised as Triton does at a launch.

A kernel's mode, interpreted or compiled, is fixed when it is decorated. So this file runs as a program of its
own, without TRITON_INTERPRET: `python tests/support/aot.py class_apply` compiles an op's kernels (all ops'
without a name) and prints the table; with `--write` it records them in bench/results/resources.json, for this
version of Triton.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from catseg_fast.kernels import OPS, load
from catseg_fast.kernels.launch.capability import CAPABILITIES
from catseg_fast.kernels.launch.launcher import Launch
from support.compiling import compile_launch

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench" / "results" / "resources.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = (
    ("fp16", torch.float16, "ieee", False),
    ("bf16", torch.bfloat16, "ieee", False),
    ("fp32 ieee", torch.float32, "ieee", False),
    ("fp32 tf32x3", torch.float32, "tf32x3", False),
    ("fp16 with options", torch.float16, "ieee", True),
)


@dataclass(frozen=True)
class Chip:
    """Limits of one streaming multiprocessor (CUDA C++ programming guide, technical specifications)."""

    block_memory: int  # bytes of shared memory that one program may take
    memory: int  # bytes of shared memory
    warps: int
    programs: int
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that the system takes for each program


CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, 64, 32),
    86: Chip(99 * 1024, 100 * 1024, 48, 16),
    89: Chip(99 * 1024, 100 * 1024, 48, 24),
    90: Chip(227 * 1024, 228 * 1024, 64, 32),
    100: Chip(227 * 1024, 228 * 1024, 64, 32),
}


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: `stack` and `shared` in bytes, `spills` in instructions.

    `mma` names the matrix instructions in the code, of "mma", "wgmma" and "tcgen05", separated by spaces;
    `programs` is the number of programs that fit on a streaming multiprocessor at a time.
    """

    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    shared: int
    mma: str
    programs: int


@dataclass(frozen=True)
class Target:
    """One launch of an op, for one compute capability.

    Attributes:
        op: name of the op.
        name: name of the launch, unique among all ops and chips, as in the record.
        capability: compute capability of the GPU.
        launch: the launch, with its arguments.
        mma: the matrix instruction that the code must have: "mma" for any kind, "wgmma", or None.
        max_stack: bytes of stack that are accepted.
    """

    op: str
    name: str
    capability: int
    launch: Launch
    mma: str | None = None
    max_stack: int = 0


@functools.cache
def targets(op: str, capability: int) -> tuple[Target, ...]:
    """List the launches of an op at its sizes: a kernel in all types at its first size, then only in fp16.

    Launches that compile alike are one.
    """
    declared, found, seen = load(op), [], set()
    known: set[str] = set()
    for variant, sizes in {**declared.sizes, **declared.special}.items():
        before = frozenset(known)
        for kind, dtype, precision, with_options in TYPES:
            _, launches = declared.dry_run(sizes, dtype, precision, capability, with_options)
            of_kernel: dict[str, int] = {}
            for launch in launches:
                name = launch.kernel.__name__
                of_kernel[name] = number = of_kernel.get(name, 0) + 1
                known.add(name)
                if name in before and dtype != torch.float16:
                    continue
                alike = (name, specialise(launch), repr(sorted(launch.options.items())))
                if alike in seen:
                    continue
                seen.add(alike)
                mma: str | None = declared.mma.get(name)
                if dtype == torch.float32:
                    mma = "mma" if mma and precision == "tf32x3" and _is_split(launch) else None
                elif mma == "wgmma" and capability != 90:
                    mma = "mma"
                words = [name, *([str(number)] if number > 1 else []), kind]
                title = ", ".join(filter(None, [" ".join(words), variant]))
                key = f"{op} / {title} / sm_{capability}"
                found.append(Target(op, key, capability, launch, mma, declared.max_stack.get(name, 0)))
    return tuple(found)


def specialise(launch: Launch) -> str:
    """Return the types and values on which Triton specialises a kernel."""
    described = {}
    for name, value in {**launch.arguments, **launch.constants}.items():
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            value = (value.base.dtype, value.block_shape, getattr(value, "padding", None))
        elif isinstance(value, float) and name in launch.arguments:
            value = "a number"
        elif isinstance(value, int) and name in launch.arguments:
            value = 1 if value == 1 else value % 16 == 0
        described[name] = value
    return repr(described)


def _is_split(launch: Launch) -> bool:
    """Check whether products of fp32 numbers run on tensor cores."""
    return launch.constants.get("PRECISION") != "ieee"


def resources_of(ops: Iterable[str], capabilities: Iterable[int]) -> dict[str, Resources | str]:
    """Compile ops for chips in another process: return resources by name, or the error if one fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    chosen = [*ops, "--capabilities", *map(str, capabilities)]
    command = [sys.executable, __file__, *chosen, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    compiled = json.loads(done.stdout.splitlines()[-1])
    return {name: x if isinstance(x, str) else Resources(**x) for name, x in compiled.items()}


def faults(target: Target, taken: Resources | str) -> list[str]:
    """List the faults of a compiled target."""
    if isinstance(taken, str):
        return [f"does not compile: {taken}"]
    found = []
    limit = CHIPS[target.capability].block_memory
    if taken.shared > limit:
        found.append(f"{taken.shared} bytes of shared memory; sm_{target.capability} has {limit}")
    if taken.stack > target.max_stack:
        found.append(f"{taken.stack} bytes of stack; {target.max_stack} are accepted")
    if taken.spills_in_loops:
        found.append(f"{taken.spills_in_loops} spills in a loop")
    came_out = taken.mma.split()
    if target.mma == "mma" and not came_out:
        found.append("no matrix instruction")
    elif target.mma not in (None, "mma") and target.mma not in came_out:
        found.append(f"no {target.mma}, but {taken.mma or 'no matrix instruction'}")
    return found


def recorded() -> dict[str, dict[str, Any]] | None:
    """Return the recorded resources by name; None if this version of Triton is not recorded."""
    if not RECORD.exists():
        return None
    record: dict[str, dict[str, dict[str, Any]]] = json.loads(RECORD.read_text())
    return record.get(triton.__version__)


def compile_target(target: Target) -> Resources:
    """Compile as a launch would, and read the cubin."""
    compiled = compile_launch(target.launch, gpu(target.capability))
    return _read(compiled, target.launch.options.get("num_warps", 4), CHIPS[target.capability])


def gpu(capability: int) -> Any:
    """Return Triton's description of a GPU."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


def _read(compiled: Any, num_warps: int, chip: Chip) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if match is None:
            raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
        registers, stack = int(match[1]), int(match[2])
        # Registers are spilled to the stack; the disassembler takes as long as ptxas.
        spills, spills_in_loops = count_spills(_run("nvdisasm", "-c", file.name)) if stack else (0, 0)
    shared = compiled.metadata.shared
    by_warp = -(-registers * 32 // 256) * 256  # registers come in units of 256 per warp
    programs = min(
        chip.programs,
        chip.warps // num_warps,
        chip.registers // by_warp // num_warps,
        chip.memory // (shared + chip.reserved),
    )
    ptx = compiled.asm["ptx"]
    kinds = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
    mma = " ".join(kind for kind, instruction in kinds.items() if instruction in ptx)
    return Resources(registers, stack, spills, spills_in_loops, shared, mma, programs)


def count_spills(code: str) -> tuple[int, int]:
    """Count instructions on local memory in nvdisasm's output: all, and those in loops."""
    labels: dict[str, int] = {}
    local: list[int] = []
    loops: list[tuple[int, int]] = []
    for index, line in enumerate(code.splitlines()):
        if match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = index
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?(LDL|STL|BRA)\b(.*)", line):
            if match[1] != "BRA":
                local.append(index)
            elif (jump := re.search(r"`\((\.L_\w+)\)", match[2])) and jump[1] in labels:
                loops.append((labels[jump[1]], index))
    # A kernel ends with a jump to itself.
    inside = sum(any(start <= index <= end for start, end in loops) for index in local)
    return len(local), inside


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")
    return done.stdout


def _compile(op: str, capability: int, index: int) -> tuple[str, dict[str, Any] | str]:
    target = targets(op, capability)[index]
    try:
        return target.name, asdict(compile_target(target))
    except Exception as error:  # any error of the compiler is a result
        cause = error.__cause__ or error
        return target.name, f"{type(cause).__name__}: {str(cause)[-600:]}"


def _compile_all(ops: list[str], capabilities: Sequence[int]) -> dict[str, dict[str, Any] | str]:
    jobs = [
        (op, capability, index)
        for op in ops
        for capability in capabilities
        for index in range(len(targets(op, capability)))
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        return dict(pool.map(_compile, *zip(*jobs, strict=True), chunksize=1)) if jobs else {}


def table(compiled: dict[str, dict[str, Any] | str]) -> str:
    """Return the resources, one line per target."""
    columns = ("registers", "stack", "spills", "spills_in_loops", "shared", "mma", "programs")
    width = max(map(len, compiled), default=0)
    lines = [f"{'triton ' + triton.__version__:{width}}  " + "  ".join(columns)]
    for name, taken in compiled.items():
        cells = [taken] if isinstance(taken, str) else [f"{taken[c]!s:>{len(c)}}" for c in columns]
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def write(compiled: dict[str, dict[str, Any] | str], ops: list[str]) -> None:
    """Record resources under this version of Triton, in place of earlier records of these ops."""
    failed = [name for name, taken in compiled.items() if isinstance(taken, str)]
    if failed:
        raise SystemExit(f"not recorded: {', '.join(failed)} did not compile")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    old = {
        name: x
        for name, x in record.get(triton.__version__, {}).items()
        if (op := name.split(" / ")[0]) in OPS and op not in ops
    }
    record[triton.__version__] = dict(sorted({**old, **compiled}.items()))
    lines = ",\n".join(
        f'  "{version}": {{\n'
        + ",\n".join(f'    "{name}": {json.dumps(x)}' for name, x in by_name.items())
        + "\n  }"
        for version, by_name in sorted(record.items())
    )
    RECORD.write_text(f"{{\n{lines}\n}}\n")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops of catseg_fast.kernels; all without a name")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--write", action="store_true", help=f"record the result in {RECORD.name}")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    arguments = parser.parse_args()
    if arguments.write and len(arguments.capabilities) < len(CAPABILITIES):
        parser.error("--write: records all capabilities")
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels do not compile")
    ops = arguments.ops or list(OPS)
    compiled = _compile_all(ops, arguments.capabilities)
    print(json.dumps(compiled) if arguments.json else table(compiled))
    if arguments.write:
        write(compiled, ops)


if __name__ == "__main__":
    main()
