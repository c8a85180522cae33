"""Reading files: every reader refuses a FIFO or a device in place of a file, and does not wait for it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catseg_fast.checkpoints.checkpoint import convert, read_checkpoint
from catseg_fast.checkpoints.hub import resolve
from catseg_fast.data.folder import FolderDataset, read_annotation
from catseg_fast.data.published import import_dataset
from catseg_fast.files import open_regular, read_text
from catseg_fast.inference.images import load_image
from catseg_fast.text.class_lists import read_classes

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name(".pipe"))
    path.symlink_to(".pipe")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (fifo, "is a FIFO"),
    "link": (link_to_fifo, "is a FIFO"),
    "device": (device, "is a device"),
    "socket": (listening, "is a socket"),
}


def dataset(root: Path) -> Path:
    """A data set of one picture, without the file that a test replaces."""
    for name in ("images", "annotations"):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / name / "a.png")
    (root / "classes.json").write_text(json.dumps(["sky", "tree"]))
    return root


def replaced(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A data set with one file replaced by something special."""
    path = dataset(root) / name
    path.unlink()
    make(path)
    return root


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "open_regular": ("a", open_regular),
    "text": ("a", read_text),
    "checkpoint": ("a.pth", read_checkpoint),
    "safetensors": ("a.safetensors", read_checkpoint),
    "weights": ("a.pth", resolve),
    "convert": ("a.pth", lambda path: convert(path, path.with_name("b.safetensors"))),
    "picture": ("a.png", load_image),
    "classes": ("a.txt", read_classes),
    "classes, JSON": ("a.json", read_classes),
    "annotation": ("a.png", lambda path: read_annotation(path, 2)),
}


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose path is short, as a socket's name must be."""
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused(reader: str, kind: str, short: Path) -> None:
    (name, read), (make, reason) = READERS[reader], SPECIAL[kind]
    make(short / name)
    with pytest.raises(ValueError, match=f"{name} {reason}, not a regular file"):
        read(short / name)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["classes.json", "images/a.png", "annotations/a.png"])
def test_special_files_in_a_data_set_are_refused(name: str, kind: str, short: Path) -> None:
    make, reason = SPECIAL[kind]
    with pytest.raises(ValueError, match=f"{name} {reason}"):
        FolderDataset(replaced(short / "data", name, make))[0]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("folder", ["images", "annotations"])
def test_special_files_are_not_imported(folder: str, kind: str, short: Path) -> None:
    make, reason = SPECIAL[kind]
    data = replaced(short / "data", f"{folder}/a.png", make)
    with pytest.raises(ValueError, match=reason):
        import_dataset(data / "images", data / "annotations", ["sky"], short / "target", copy=True)


def test_what_is_special_is_not_opened(short: Path) -> None:
    """Opening the writing end of a FIFO fails without a reader: the refusal must not have left one."""
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="is a FIFO"):
        open_regular("pipe")
    with pytest.raises(OSError, match="No such device"):
        os.open("pipe", os.O_WRONLY | os.O_NONBLOCK)


def test_a_file_that_becomes_special_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of the opened file counts, not that of the file before."""
    (short / "file").write_text("x")
    os.mkfifo("pipe")
    regular, real = os.stat("file"), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **_: regular if path == "pipe" else real(path))
    with pytest.raises(ValueError, match="pipe is a FIFO"):
        open_regular("pipe")


def test_regular_files_links_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("Grüße", encoding="utf-8")
    (tmp_path / "link").symlink_to(path)
    assert read_text(path) == read_text(tmp_path / "link") == "Grüße"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        open_regular(tmp_path / "none")
