"""GPUs that are not present, for code that only asks for their properties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from catseg_fast.kernels.launch import configs


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int]) -> None:
    """Let PyTorch report GPUs of these names, compute capabilities (90 for 9.0) and multiprocessors."""
    found = [
        SimpleNamespace(
            name=name, major=capability // 10, minor=capability % 10, multi_processor_count=count,
            total_memory=80 * 2**30,
        )
        for name, capability, count in gpus
    ]  # fmt: skip

    def properties(device: torch.device | int) -> SimpleNamespace:
        return found[device if isinstance(device, int) else device.index or 0]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties(device).name)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device: (properties(device).major, properties(device).minor),
    )
    configs.clear()
