"""Description of a machine for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
            from catseg_fast.kernels import TUNABLE_OPS, load
            from catseg_fast.kernels.launch.compiling import ptxas
            from catseg_fast.kernels.launch.origins import describe  # triton exists only for Linux

            report[f"GPU {index}, launch configs"] = describe(map(load, TUNABLE_OPS), device, torch.float16)
            report[f"GPU {index}, ptxas"] = ptxas(10 * gpu.major + gpu.minor)
    if not count:
        report["GPU"] = "none"
    report["CPU"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    report["OS"] = platform.platform()
    report["backend"] = choose_backend("auto", default_device())
    return report


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
