"""Work that is killed, as by kill -9, before one of its changes to the file system.

The work runs in a forked process, which needs no new interpreter and no new model. Python tells of each
change beforehand (`sys.addaudithook`); what libraries in other languages write is not seen, and happens in
temporary folders.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]
Content = dict[str, Any]  # of a folder, by path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TEMPORARY = ".catseg-fast-"


def run(work: Work, folder: Path, kill: int | None = None) -> list[str]:
    """Run work in a forked process; return the names of the changes that it made in `folder`.

    Args:
        work: what to do.
        folder: changes elsewhere do not count.
        kill: number of the change, from 0, before which the process is killed; None to let it end.

    Raises:
        AssertionError: if the process has ended otherwise.
    """
    names = mmap.mmap(-1, 2**16)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            _watch(os.path.realpath(folder), names, kill)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    changes = names[:].rstrip(b"\0").decode().split()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed if kill is not None else status == 0, f"status {status} after {changes}"
    return changes


def _watch(folder: str, names: mmap.mmap, kill: int | None) -> None:
    """From now on, write down each change in `folder`, and kill this process before change `kill`."""
    count = 0

    def change(name: str) -> None:
        nonlocal count
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        names.write(f"{name} ".encode())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITING and _is_in(path, folder):
                change("open")
        elif event in CHANGES and _concerns(arguments, folder):
            change(event.removeprefix("os."))

    flush = os.fsync

    def fsync(descriptor: int) -> None:
        change("fsync")
        flush(descriptor)
        change("fsynced")

    os.fsync = fsync
    sys.addaudithook(hook)


def _concerns(arguments: tuple[Any, ...], folder: str) -> bool:
    """Check whether an event is about a path in a folder, or in one that is open (a tree is removed)."""
    descriptors = [value for value in arguments[1:] if type(value) is int and value >= 0]
    return bool(descriptors) or any(_is_in(path, folder) for path in arguments)


def _is_in(path: Any, folder: str) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(folder)


@dataclass
class Table:
    """What killing has led to, of each writer: the changes by name, and how the folder was after the kill."""

    changes: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)

    @property
    def points(self) -> int:
        return self.changes.total()


def kill_everywhere(
    start: Work,
    work: Work,
    again: Work,
    folder: Path,
    read: Callable[[Path], Content],
    check: Callable[[Path], str] = lambda folder: "",
    every: int = 1,
) -> Table:
    """Kill `work` before each of its changes, do `again`, and compare with the same without a kill.

    Args:
        start: makes what is in `folder` before.
        work: what is killed.
        again: what is done afterwards: the same work, or the one of before.
        folder: all of these change nothing else.
        read: the content of `folder` by name, apart from what differs from run to run, as times.
        check: called after the kill; raises if the folder then holds something wrong, else says what.
        every: kill before each so many changes only.

    Raises:
        AssertionError: if the outcome is another one.
    """
    folder.mkdir()
    start()  # here, too, so that the processes need not import anything
    work()
    shutil.rmtree(folder)
    folder.mkdir()
    before = folder.with_name(f"{folder.name}-before")
    run(start, folder)
    shutil.copytree(folder, before, symlinks=True)
    changes = run(work, folder)
    run(again, folder)
    expected = read(folder)
    table = Table()
    for point in range(0, len(changes), every):
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)
        run(work, folder, kill=point)
        where = f"killed before change {point} of {len(changes)}, {changes[point]}"
        try:
            table.states[check(folder)] += 1
            table.changes[changes[point]] += 1
            run(again, folder)
            found = read(folder)
            different = [
                name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
            ]
            assert not different, f"{different} differ"
            assert not list(left(folder)), f"{list(left(folder))} are left"
        except BaseException as error:
            raise AssertionError(f"{where}: {error!r}") from error
    return table


def left(folder: Path) -> Iterator[Path]:
    """The files in temporary folders; an empty one stays until the next write beside it."""
    for temporary in folder.rglob(f"{TEMPORARY}*"):
        yield from temporary.iterdir()
