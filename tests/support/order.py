"""Products in a kernel's code whose sums do not start at zero.

Triton compiles `tl.dot(a, b) + c` to a sum that starts at `c`. In fp32 each of its steps is then rounded like
a number of c's size, where adding `c` at the end rounds once. This file runs as a program of its own, without
TRITON_INTERPRET, as `support/aot.py` does; it prints JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from catseg_fast.kernels import OPS
from support import aot
from support.compiling import source_of


def products_that_start_elsewhere(ttir: str) -> list[str]:
    """Return the `tt.dot` operations that start neither at zero nor at another product, in or before a loop.

    An attention mask may come first: 0 is exact, and scores that are masked do not count.
    """
    defined = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, flags=re.M))
    found = []
    for line in re.findall(r"^.* = tt\.dot .*$", ttir, flags=re.M):
        accumulator = re.search(r"tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", line)
        assert accumulator is not None, line
        origin = defined.get(accumulator[1])  # None: an argument of a loop's body
        if origin is not None and not re.match(
            r"arith\.(constant dense<0\.0|select )|tt\.dot |scf\.for ", origin
        ):
            found.append(f"{line.strip()}; {accumulator[1]} = {origin}")
    return found


def orders() -> dict[str, dict[str, list[str]]]:
    """Run `products_that_start_elsewhere` for all ops in fp32, in another process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{__file__} failed:\n{done.stderr[-4000:]}")
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ttir(target: aot.Target) -> str:
    """Return a target's code after the first passes of Triton's compiler, which fold sums into products."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    gpu = aot.gpu(target.capability)
    source, parsed = source_of(target.launch, gpu)
    backend = make_backend(gpu)
    options = backend.parse_options({**parsed, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations = backend.get_codegen_implementation(options)
    module = source.make_ir(gpu, options, implementations, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def main() -> None:
    """The program."""
    found = {}
    for op in OPS:
        targets = [target for target in aot.targets(op, 90) if " fp32 ieee" in target.name]
        found[op] = {target.name: products_that_start_elsewhere(_ttir(target)) for target in targets}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
