"""Compile kernels for GPUs that are not there, and read what they take from the machine code.

A kernel's mode, interpreted or compiled, is fixed when it is decorated. So this file runs as a program of its
own, without TRITON_INTERPRET: `python tests/support/aot.py class_attention.apply` compiles a module's targets
(all modules' without a name) and prints the table; with `--write` it records them in
bench/results/resources.json, for this version of Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

import catseg_fast.kernels
from catseg_fast.kernels.launch.compile_target import CAPABILITIES, CompileTarget

RECORD = Path(__file__).parents[2] / "bench" / "results" / "resources.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
    """What one compiled kernel takes: `stack` and `shared` in bytes, `spills` in instructions.

    `mma` names the matrix instructions that came out, of "mma", "wgmma" and "tcgen05", a space between;
    `programs` is how many fit on a streaming multiprocessor at a time.
    """

    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    shared: int
    mma: str
    programs: int


def modules() -> list[str]:
    """Names of the kernel modules that declare targets."""
    package = catseg_fast.kernels
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = (module.name.removeprefix(f"{package.__name__}.") for module in found)
    return [name for name in names if hasattr(_import(name), "compile_targets")]


def targets(module: str, capability: int) -> list[CompileTarget]:
    """The targets that a module declares."""
    declared: list[CompileTarget] = _import(module).compile_targets(capability)
    return declared


def key(module: str, capability: int, target: CompileTarget) -> str:
    """A target's name among all modules' and chips'."""
    return f"{module} / {target.name} / sm_{capability}"


def resources_of(module: str) -> dict[str, Resources | str]:
    """Compile a module's targets in another process: resources by `key`, or the error where one fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    compiled = json.loads(done.stdout.splitlines()[-1])
    return {name: x if isinstance(x, str) else Resources(**x) for name, x in compiled.items()}


def faults(target: CompileTarget, capability: int, taken: Resources | str) -> list[str]:
    """What is wrong with a compiled target; empty if nothing is."""
    if isinstance(taken, str):
        return [f"does not compile: {taken}"]
    found = []
    limit = CHIPS[capability].block_memory
    if taken.shared > limit:
        found.append(f"{taken.shared} bytes of shared memory; sm_{capability} has {limit}")
    if taken.stack > target.max_stack:
        found.append(f"{taken.stack} bytes of stack; {target.max_stack} are accepted")
    if taken.spills_in_loops:
        found.append(f"{taken.spills_in_loops} spills in a loop")
    came_out = taken.mma.split()
    if target.expects_mma == "mma" and not came_out:
        found.append("no matrix instruction")
    elif target.expects_mma not in (None, "mma") and target.expects_mma not in came_out:
        found.append(f"no {target.expects_mma}, but {taken.mma or 'no matrix instruction'}")
    return found


def recorded() -> dict[str, dict[str, Any]] | None:
    """Recorded resources by `key`, or None where nobody recorded this version of Triton."""
    if not RECORD.exists():
        return None
    record: dict[str, dict[str, dict[str, Any]]] = json.loads(RECORD.read_text())
    return record.get(triton.__version__)


def compile_target(target: CompileTarget, capability: int) -> Resources:
    """Compile as a launch would, and read the cubin."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = target.kernel.arg_names
    if set(arguments) != {*target.signature, *target.constexprs}:
        wrong = set(arguments) ^ {*target.signature, *target.constexprs}
        raise ValueError(f"signature and constexprs differ from the kernel's arguments in {sorted(wrong)}")
    divisible = [
        (index,)
        for index, name in enumerate(arguments)
        if target.signature.get(name, "").startswith("*") or name in target.divisible
    ]
    source = ASTSource(
        fn=target.kernel,
        signature={name: target.signature.get(name, "constexpr") for name in arguments},
        constexprs={(arguments.index(name),): value for name, value in target.constexprs.items()},
        attrs={index: [["tt.divisibility", 16]] for index in divisible},
    )
    options = {"num_warps": target.num_warps, "num_stages": target.num_stages, "enable_fp_fusion": True}
    if target.maxnreg is not None:
        options["maxnreg"] = target.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(compiled, target.num_warps, CHIPS[capability])


def _read(compiled: Any, num_warps: int, chip: Chip) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack = int(match[1]), int(match[2])
    spills, spills_in_loops = count_spills(code)
    shared = compiled.metadata.shared
    by_warp = -(-registers * 32 // 256) * 256  # registers come in units of 256 a warp
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
    """Instructions on local memory in nvdisasm's output: all, and those from a label to a jump back to it."""
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
    # What ends a kernel is a jump to itself.
    inside = sum(any(start <= index <= end for start, end in loops) for index in local)
    return len(local), inside


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")
    return done.stdout


def _import(module: str) -> Any:
    return importlib.import_module(f"catseg_fast.kernels.{module}")


def _compile(module: str, capability: int, index: int) -> tuple[str, dict[str, Any] | str]:
    target = targets(module, capability)[index]
    name = key(module, capability, target)
    try:
        return name, asdict(compile_target(target, capability))
    except Exception as error:  # whatever the compiler says is the result
        cause = error.__cause__ or error
        return name, f"{type(cause).__name__}: {str(cause)[-600:]}"


def _compile_all(names: list[str]) -> dict[str, dict[str, Any] | str]:
    jobs = [
        (module, capability, index)
        for module in names
        for capability in CAPABILITIES
        for index in range(len(targets(module, capability)))
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        return dict(pool.map(_compile, *zip(*jobs, strict=True), chunksize=1)) if jobs else {}


def table(compiled: dict[str, dict[str, Any] | str]) -> str:
    """The resources, a line a target."""
    columns = ("registers", "stack", "spills", "spills_in_loops", "shared", "mma", "programs")
    width = max(map(len, compiled), default=0)
    lines = [f"{'triton ' + triton.__version__:{width}}  " + "  ".join(columns)]
    for name, taken in compiled.items():
        cells = [taken] if isinstance(taken, str) else [f"{taken[c]!s:>{len(c)}}" for c in columns]
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def write(compiled: dict[str, dict[str, Any] | str], names: list[str]) -> None:
    """Record resources under this version of Triton, in place of what was recorded of these modules."""
    failed = [name for name, taken in compiled.items() if isinstance(taken, str)]
    if failed:
        raise SystemExit(f"not recorded: {', '.join(failed)} did not compile")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    old = {
        name: x for name, x in record.get(triton.__version__, {}).items() if name.split(" / ")[0] not in names
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
    parser.add_argument("modules", nargs="*", help="modules of catseg_fast.kernels; all without a name")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--write", action="store_true", help=f"record the result in {RECORD.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels do not compile")
    names = arguments.modules or modules()
    compiled = _compile_all(names)
    print(json.dumps(compiled) if arguments.json else table(compiled))
    if arguments.write:
        write(compiled, names)


if __name__ == "__main__":
    main()
