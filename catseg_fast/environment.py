"""Description of a machine: for bug reports, `CATSeg.explain()`, and the records of benchmarks and checks."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = {  # name to show: name of the distribution
    "triton": "triton",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "numpy": "numpy",
    "pillow": "pillow",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
}


def describe_environment() -> dict[str, str]:
    """Versions, devices and the back end that "auto" takes, by name."""
    import torch

    from catseg_fast._version import __version__
    from catseg_fast.backend import choose_backend, default_device, why_no_triton

    report = {"catseg-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    report |= {name: _version(package) for name, package in PACKAGES.items()}
    report["CUDA"] = torch.version.cuda or "torch is built without it"
    count = torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        report[f"GPU {index}"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB"
        if why_no_triton(device := torch.device("cuda", index)) is None:
            report[f"GPU {index}, launch configs"] = describe_configs(device, torch.float16)
            report[f"GPU {index}, ptxas"] = ptxas(10 * gpu.major + gpu.minor)
    if not count:
        report["GPU"] = "none"
    report["CPU"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    report["OS"] = platform.platform()
    report["backend"] = choose_backend("auto", default_device())
    return report


# Triton, which the functions below import, exists only for Linux.


def describe_configs(gpu: torch.device, dtype: torch.dtype) -> str:
    """Return where the launch configs of a GPU come from, at the published sizes.

    They are measured on it, borrowed from another GPU, or defaults.
    """
    from catseg_fast.kernels import TUNABLE_OPS, load
    from catseg_fast.kernels.launch import configs
    from catseg_fast.kernels.launch.capability import capability_of

    kernels_by_origin: dict[str, dict[str, None]] = {}
    for op in map(load, TUNABLE_OPS):
        for sizes in op.sizes.values():
            calls, _ = op.dry_run(sizes, dtype, "ieee", capability_of(gpu))
            for call in calls:
                origin = configs.origin(call.problem, gpu)
                kernels_by_origin.setdefault(origin, {})[call.problem.kernel] = None
    parts = [
        origin if len(kernels_by_origin) == 1 else f"{', '.join(kernels)}: {origin}"
        for origin, kernels in kernels_by_origin.items()
    ]
    own = all(origin.startswith("measured") for origin in kernels_by_origin)
    return "; ".join(parts) + ("" if own else "; `catseg-fast tune` measures this GPU's own")


def describe_compiler(gpu: torch.device) -> str:
    """Return the versions of Triton and of its assembler for a GPU."""
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability(gpu)
    return f"triton {triton.__version__}, ptxas {ptxas(10 * major + minor)}"


def ptxas(capability: int) -> str:
    """Return the version of the assembler that Triton uses for a compute capability (90 for 9.0).

    The path follows, if it is not Triton's own assembler.
    """
    import triton

    try:
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(capability)
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"not found ({error})"
    own = Path(tool.path).resolve().is_relative_to(Path(triton.__file__).resolve().parent)
    return tool.version if own else f"{tool.version} ({tool.path})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the CPU's name, which Linux has only in /proc."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
