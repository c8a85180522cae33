"""Writing files: completely or not at all, by one process at a time, with an error that says why."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from catseg_fast import files
from catseg_fast.checkpoints.checkpoint import convert
from catseg_fast.checkpoints.write import write_torch_file, write_weights
from catseg_fast.errors import RunError
from catseg_fast.files import acquire_lock, locked, replacing, temporary_folder
from catseg_fast.output.statistics import write_statistics
from catseg_fast.training.checkpoints import Checkpoints, export
from support.disk import small_disk
from support.tiny import tiny_model

resource = pytest.importorskip("resource")
TENSORS = {"a": torch.arange(90_000.0).view(300, 300), "b": torch.arange(3)}


def text(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("x" * 200_000)


def picture(path: Path) -> None:
    with replacing(path) as temporary:
        Image.effect_noise((500, 500), 100).save(temporary)


def trained(path: Path) -> None:
    export(TENSORS, path, torch.float32, "demo")


def statistics(path: Path) -> None:
    source = path.with_name(".source.json")
    entry = {"index": 0, "name": "x" * 200_000, "share": 1.0, "mean_score": 1.0}
    content = json.dumps({"image": "a", "width": 1, "height": 1, "classes": [entry]})
    if not source.exists():
        source.write_text(content)
    write_statistics(path, [source])


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text.txt": text,
    "picture.png": picture,
    "weights.safetensors": lambda path: write_weights(path, TENSORS, {"a": "b"}),
    "weights.pth": lambda path: write_weights(path, TENSORS, {}),
    "content.pt": lambda path: write_torch_file(path, {"step": 3, **TENSORS}),
    "trained.safetensors": trained,
    "statistics.json": statistics,
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".source.json"}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_a_failed_write_says_why_and_changes_nothing(
    name: str, earlier: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "statistics.json":  # other files are never replaced by statistics
        statistics(path)
        earlier = earlier and path.read_bytes()
        path.unlink()
    if earlier is not None:
        path.write_bytes(earlier)
    for size in (0, 1000, 100_000):
        with small_disk(size), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            WRITERS[name](path)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(path)
        assert names(tmp_path) == (set() if earlier is None else {name})
    if earlier is not None:
        assert path.read_bytes() == earlier
    WRITERS[name](path)
    assert path.stat().st_size > 100_000


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_failed_conversion_says_why(suffix: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.pth", tmp_path / f"out{suffix}"
    torch.save({"model": tiny_model().state_dict()}, source)
    with small_disk(100_000), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        convert(source, target)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(target))
    assert names(tmp_path) == {"in.pth"}


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, **TENSORS})
    with small_disk(100_000), pytest.raises(OSError, match=r"File too large: .*step-00000003\.pt"):
        checkpoints.save(3, {"step": 3, **TENSORS})
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_files_get_the_umasks_permissions(name: str, mask: int, tmp_path: Path) -> None:
    previous = os.umask(mask)
    try:
        WRITERS[name](tmp_path / name)
        (tmp_path / "plain").touch()
    finally:
        os.umask(previous)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("parent", "kind", "number"),
    [("none", FileNotFoundError, errno.ENOENT), ("file", NotADirectoryError, errno.ENOTDIR)],
)
def test_a_folder_that_is_none(parent: str, kind: type[OSError], number: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / parent / "out.safetensors"
    with pytest.raises(kind) as caught:
        write_weights(target, TENSORS, {})
    assert (caught.value.errno, caught.value.filename) == (number, str(target))


OTHER_ERRORS = [ValueError("bad"), RuntimeError("bad"), KeyboardInterrupt(), OSError("of a decoder")]


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=repr)
def test_other_errors_stay_as_they_are(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as found:
        write_half(tmp_path / "a", error)
    assert found.value is error
    assert names(tmp_path) == set()


def test_a_failure_to_read_is_no_failure_to_write(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        missing.read_bytes()
    assert caught.value.filename == str(missing)
    with pytest.raises(ValueError, match="bad"), replacing(tmp_path / "a"):
        raise ValueError("bad") from OSError(errno.EIO, "read error")
    assert names(tmp_path) == set()


def test_links_are_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    mode = (tmp_path / "source").stat().st_mode
    with replacing(tmp_path / "link") as temporary:
        temporary.symlink_to(tmp_path / "source")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "source").stat().st_mode == mode


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".json")  # 255 bytes, the most that file systems take
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == {path.name}


# ---- what killed processes leave --------------------------------------------------------------------------

KILLED = """
import os, signal, sys, time
from pathlib import Path
from catseg_fast.files import replacing

with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    (temporary.parent / "of the library").write_text("half")
    print("ready", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(path: Path, fate: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), fate],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture
def unswept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act like a new process, which has swept no folder yet."""
    monkeypatch.setattr(files, "_swept", set())


def test_what_a_killed_process_leaves_is_swept(tmp_path: Path, unswept: None) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    child = start(path, "killed")
    assert child.wait() == -signal.SIGKILL
    (left,) = names(tmp_path) - {"a.txt"}
    assert left.startswith(".catseg-fast-")
    assert path.read_text() == "earlier"
    with replacing(tmp_path / "another.txt") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == {"a.txt", "another.txt"}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, unswept: None) -> None:
    path = tmp_path / "a.txt"
    child = start(path, "lives")
    text(tmp_path / "b.txt")
    assert len(names(tmp_path)) == 2
    child.communicate("go on")
    assert child.returncode == 0
    assert path.read_text() == "half"
    assert names(tmp_path) == {"a.txt", "b.txt"}


def leave(folder: Path, host: str, process: int, started: int, hours: float = 0) -> Path:
    left = folder / f".catseg-fast-{host}-{process}-{started}-0123abcd.tmp"
    left.mkdir()
    (left / "half").touch()
    for path in (left / "half", left):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    return left


def test_what_is_stale(tmp_path: Path, unswept: None) -> None:
    host, ours = files._host(), os.getpid()
    started = files._started(ours)
    assert started is not None
    stale = [
        leave(tmp_path, host, 2**22 + 1, started),  # beyond the largest number of a process
        leave(tmp_path, host, ours, started - 1000),  # of a process that had our number
        leave(tmp_path, "0" * 8, 1, 1, hours=25),
    ]
    fresh = [
        leave(tmp_path, host, ours, started, hours=99),
        leave(tmp_path, "1" * 8, 1, 1, hours=23),
    ]
    others = [tmp_path / name for name in (".catseg-fast-notes", ".catseg-fast-1-2-3-4.tmp", ".a.txt.12.tmp")]
    for path in others:
        path.mkdir()
    text(tmp_path / "a.txt")
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in (*fresh, *others))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere, only the time of day is known")
def test_the_clock_is_set_while_a_process_writes(
    tmp_path: Path, unswept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time at which the machine seems to have started changes with it."""
    child = start(tmp_path / "a.txt", "lives")
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) - 3600)
    text(tmp_path / "b.txt")
    child.communicate("go on")
    assert child.returncode == 0
    assert names(tmp_path) == {"a.txt", "b.txt"}


def test_processes_of_another_container_are_not_known(
    tmp_path: Path, unswept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have numbers of their own, and may have the machine's name."""
    left = leave(tmp_path, files._host(), 2**22 + 1, 1)
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    text(tmp_path / "a.txt")
    assert left.exists()


def test_a_folder_is_swept_once(tmp_path: Path, unswept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan for each of many pictures would take quadratic time."""
    scanned: list[Path] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scan(path))
    for _ in range(5):
        with temporary_folder(tmp_path):
            pass
    assert scanned.count(tmp_path) == 1


# ---- several processes ------------------------------------------------------------------------------------


def together(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0, 1, … in several processes at a time."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(index,)) for index in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * count


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")

    def add(_: int) -> None:
        for _ in range(20):
            with locked(path):
                count = int(path.read_text())
                time.sleep(0.001)
                with replacing(path) as temporary:
                    temporary.write_text(str(count + 1))

    together(add, 4)
    assert path.read_text() == "80"


def test_a_lock_that_is_not_free(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lock = acquire_lock(path, seconds=0)
    with pytest.raises(RunError, match=r"file is in use by another process, which holds .*\.file\.lock"):
        acquire_lock(path, seconds=0)
    lock.release()
    with locked(path, seconds=0):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def die(_: int) -> None:
        with locked(path):
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die, args=(0,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with locked(path, seconds=0):
        pass
