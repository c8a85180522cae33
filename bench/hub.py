"""Pack `kernels/` for the Hugging Face Kernel Hub, in the layout of its kernel-builder.

    python -m bench.hub dist/catseg-ops --build

The folder gets `build.toml`, `flake.nix`, the card, tests, a benchmark, and in `torch-ext/` the ops. Their
imports become relative, and their names in `torch.ops` those of the build, so that several versions can be
loaded. `kernel-builder build-and-upload` publishes it. `--build` also makes `build/torch-cuda`, which
kernel-builder makes of pure Python kernels, so that `kernels.get_local_kernel(FOLDER)` can load it here.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.runner import ROOT
from catseg_fast.files import temporary_folder

SKELETON = ROOT / "hub"  # the parts of the project that are not in kernels/
_IMPORT = re.compile(r"^( *)from catseg_fast\.kernels(\.[\w.]+)? import ", re.MULTILINE)
_OP = re.compile(r'custom_op\("catseg_fast::(\w+)"')
_CONFIGS = 'SHIPPED = Path(__file__).parents[2] / "configs"'
# What kernel-builder generates as `_ops.py`, for one build.
_OPS = '''\
import torch

_OPS_NAME = "{id}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix op by namespace."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def pack(folder: Path, *, build: bool = False) -> Path:
    """Write the project of the kernel to an empty folder; return the folder of the build, or of the project.

    Args:
        folder: destination, new or empty.
        build: whether also to make `build/torch-cuda`.

    Raises:
        FileExistsError: if there is something in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as scratch:
        _make(scratch, build)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == "build.toml"):  # which is needed
            os.replace(path, folder / path.name)
    return folder / "build" if build else folder


def _make(folder: Path, build: bool) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    shutil.copytree(SKELETON, folder, ignore=ignored, dirs_exist_ok=True)
    package = folder / "torch-ext" / _setting(folder, "name").replace("-", "_")
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        relative = path.relative_to(ROOT / "kernels")
        if relative == Path("__init__.py"):  # the package has its own
            continue
        (package / relative).parent.mkdir(parents=True, exist_ok=True)
        (package / relative).write_text(rewritten(path.read_text(), len(relative.parts) - 1))
    shutil.copytree(ROOT / "catseg_fast" / "configs", package / "configs")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    if build:
        _build(folder, package)


def rewritten(source: str, depth: int) -> str:
    """Return the source of a module for another package name: relative imports, ops named by the build.

    Args:
        source: source of a module in `kernels/`.
        depth: folders between `kernels/` and the module.
    """
    dots = "." * (depth + 1)

    def relative(match: re.Match[str]) -> str:
        indent, module = match[1], match[2] or ""
        return f"{indent}from {dots}{module[1:]} import "

    source = _IMPORT.sub(relative, source)
    source = source.replace(_CONFIGS, _CONFIGS.replace("parents[2]", "parents[1]"))
    if _OP.search(source):
        source = _OP.sub(r'custom_op(add_op_namespace_prefix("\1")', source)
        first = source.index(f"\nfrom {dots}") + 1
        source = f"{source[:first]}from {dots}_ops import add_op_namespace_prefix\n{source[first:]}"
    return source


def _setting(folder: Path, name: str) -> Any:
    """Return a setting of `build.toml`: a string, a number, or a list of strings on one line."""
    found = re.search(rf"^{name} = (.+)$", (folder / "build.toml").read_text(), re.MULTILINE)
    assert found is not None, name
    return json.loads(found[1])


def _build(folder: Path, package: Path) -> None:
    """Make the build for CUDA, as kernel-builder's `setup.py build_kernel` of a pure Python kernel."""
    variant = folder / "build" / "torch-cuda"
    shutil.copytree(package, variant)
    content = hashlib.sha256()
    for path in _files(variant):
        content.update(path.relative_to(variant).as_posix().encode() + b"\0" + path.read_bytes())
    identity = f"_{package.name}_cuda_{content.hexdigest()[:7]}"
    (variant / "_ops.py").write_text(_OPS.format(id=identity))
    digests = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest())
        for path in _files(variant)
    }
    metadata = {
        "id": identity,
        **{name: _setting(folder, name) for name in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": "cuda", "archs": _setting(folder, "cuda_capabilities")},
        "digest": {
            "algorithm": "sha256",
            "files": {name: value.decode() for name, value in digests.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack the kernels into the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.hub", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty")
    parser.add_argument("--build", action="store_true", help="also make build/torch-cuda")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {pack(options.folder, build=options.build)}")
    except FileExistsError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
