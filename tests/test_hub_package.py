"""The ops packed for the Kernel Hub: read, checked and loaded by the `kernels` package, without this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from bench.hub import main, pack, rewritten

try:
    version("kernels")
except PackageNotFoundError:
    pytest.skip("the package `kernels` is not installed", allow_module_level=True)

# `kernels` is also a folder of the checkout: the scripts run elsewhere, without catseg_fast.
START = """
import sys
sys.modules["catseg_fast"] = None
import json, pathlib, torch, kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
project = pathlib.Path(sys.argv[1])
ops = kernels.get_local_kernel(project / "build")
"""
CHECKS = """
metadata = Metadata.read_from_file(project / "build/torch-cuda/metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, project / "build/torch-cuda"))
print(json.dumps({
    "backends": [str(backend) for backend in Build.open(project).general.backends],
    "name": str(metadata.name),
    "version": metadata.version,
    "module": ops.window_block.__module__.partition(".")[0] == metadata.id,
    "ops": sorted(name for name in dir(getattr(torch.ops, metadata.id)) if name.startswith("class")),
    "names": ops.__all__,
}))
"""
ATTENTION = """
torch.manual_seed(0)
C, M, HW = 16, 20, 24
shapes = [(2, 3, HW, C), (2, HW, 2 * C), (3 * C, C), (C, C), (C,), (M, C), (M,), (C, M), (C,)]
tensors = [torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) < 3 else 1) for shape in shapes]
numbers = ((4, 6), 2, 1, 2)
block = ops.window_block(*tensors, *numbers) - ops.plain.window_block(*tensors, *numbers)
x, text = tensors[0], torch.randn(1, 3, C)
keys, bias = torch.randn(2 * C, C) / 4, torch.randn(2 * C)
def attend(ops):
    first = ops.class_collect(x[:, :2], keys, bias, text[:, :2], None, None, 2, 3, (4, 6), (1, 1))
    sums = ops.class_collect(x[:, 2:], keys, bias, text[:, 2:], *first, 2, 3, (4, 6), (1, 1), means=True)
    return ops.class_apply(x, text, *sums, *tensors[3:], 2, 3, 1e-6, (4, 6), (1, 1))
with torch.no_grad():
    attention = attend(ops) - attend(ops.plain)
compiled = torch.compile(ops.window_block, backend="eager", fullgraph=True)
same = torch.equal(compiled(*tensors, *numbers), ops.window_block(*tensors, *numbers))
try:
    ops.window_block(tensors[0], tensors[1], *tensors[3:], *numbers)
except (TypeError, ValueError) as error:
    refused = str(error)
print(json.dumps([block.abs().max().item(), attention.abs().max().item(), same, refused]))
"""
BENCHMARK = """
import runpy
names = runpy.run_path(project / "benchmarks/benchmark_attention.py")
small = {"CROPS": 1, "CLASSES": 2, "SIDE": 4, "CHANNELS": 16, "HEADS": 1, "WINDOW": 2, "HIDDEN": 16}
benchmark = names["AttentionBenchmark"]
benchmark.setup.__globals__.update(small)
work = benchmark()
work.kernel, work.device = ops, "cpu"
errors = []
with torch.no_grad():
    work.setup()
    for name in ("window_block", "class_attention"):
        getattr(work, f"benchmark_{name}")()
        errors.append((work.out - getattr(work, f"verify_{name}")()).abs().max().item())
print(json.dumps(errors))
"""

pytestmark = pytest.mark.xdist_group("hub")  # one process packs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "catseg-ops"
    assert pack(folder, build=True) == folder / "build"
    return folder


def run(project: Path, script: str) -> object:
    if torch.version.cuda is None:
        pytest.skip("kernels loads a build for CUDA only where torch is one")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", START + script, str(project)]
    result = subprocess.run(command, cwd=project.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_layout_is_the_builders(project: Path) -> None:
    there = {path.relative_to(project).parts[0] for path in project.iterdir()}
    assert there == {
        "CARD.md", "LICENSE", "benchmarks", "build", "build.toml", "flake.nix", "tests", "torch-ext",
    }  # fmt: skip
    sources = list((project / "torch-ext/catseg_ops").rglob("*.py"))
    assert len(sources) > 40
    assert not any("from catseg_fast" in path.read_text() for path in sources)
    assert run(project, CHECKS) == {
        "backends": ["cuda"],
        "name": "catseg-ops",
        "version": 1,
        "module": True,
        "ops": ["class_apply", "class_apply_into", "class_collect"],
        "names": [
            "class_apply", "class_collect", "decode", "embed_cost_volume", "pack_weights", "plain",
            "update_label_map", "window_block",
        ],
    }  # fmt: skip


def test_one_op_used_alone(project: Path) -> None:
    block, attention, compiled, refused = run(project, ATTENTION)  # type: ignore[misc]
    assert 0 < block < 1e-5
    assert 0 < attention < 1e-5
    assert compiled is True
    assert refused


def test_the_benchmark_runs(project: Path) -> None:
    errors = run(project, BENCHMARK)
    assert isinstance(errors, list)
    assert len(errors) == 2
    assert max(errors) < 1e-2


def test_sources_are_rewritten() -> None:
    source = (
        '"""An op."""\n\nimport torch\n\nfrom catseg_fast.kernels.launch import launcher\n'
        "from catseg_fast.kernels import OPS\n\n"
        'if TYPE_CHECKING:\n    from catseg_fast.kernels.a.b import c\n\n'
        '@torch.library.custom_op("catseg_fast::class_apply", mutates_args=())\n'
    )  # fmt: skip
    assert rewritten(source, 1) == (
        '"""An op."""\n\nimport torch\n\nfrom .._ops import add_op_namespace_prefix\n'
        "from ..launch import launcher\nfrom .. import OPS\n\n"
        "if TYPE_CHECKING:\n    from ..a.b import c\n\n"
        '@torch.library.custom_op(add_op_namespace_prefix("class_apply"), mutates_args=())\n'
    )


def test_other_files_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path)])
    assert "is not empty; choose a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
