"""Fixtures that several test modules use; `conftest.py` registers them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model in upstream's format, which tests leave as it is."""
    from support.command_line import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photo.png`."""
    from support.command_line import draw_photo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    draw_photo(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 30x20 pixels."""
    from PIL import Image

    from support.tiny import picture

    path = tmp_path / "photo.png"
    Image.fromarray(picture(20, 30).byte().permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture(params=[8, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def every(request: pytest.FixtureRequest) -> int:
    """A number n: slow writers are killed before every n-th of their changes."""
    return int(request.param)
