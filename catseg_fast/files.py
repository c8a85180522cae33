"""Files: only regular ones are read, and those written are whole at every moment; the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO

from catseg_fast.errors import InputError, RunError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import filelock
    from PIL.Image import Image

_OURS = ".catseg-fast-"  # how the names of temporary folders start
_DAY = 24 * 3600
_PILLOW = Lock()  # its limit is the whole process's, and pictures may be opened in threads
_swept: set[tuple[int, str]] = set()
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_image(file: BinaryIO, formats: tuple[str, ...] | None = None) -> Image:
    """Open an image as `PIL.Image.open`, which does not decode it, whatever its number of pixels.

    Pillow has a limit of its own; `max_pixels` is ours, and the only one.
    """
    from PIL import Image

    with _PILLOW:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, with links followed.

    A FIFO would wait for a writer, and a device such as /dev/zero has no end.

    Raises:
        OSError: if it cannot be opened; IsADirectoryError for a folder.
        InputError: if it is a FIFO, a device or a socket.
    """
    mode = os.stat(path).st_mode  # opening a device can have an effect
    if not stat.S_ISDIR(mode):
        _require_regular(path, mode)
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)  # it may have changed since
    except ValueError:
        file.close()
        raise
    return file


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text in a regular file; errors as of `open_regular`, and UnicodeDecodeError."""
    with open_regular(path) as file:
        return file.read().decode(encoding)


def file_digest(file: BinaryIO, algorithm: str) -> str:
    """The digest of a file's content from where it is, in hexadecimal digits."""
    digest = hashlib.new(algorithm)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise InputError(f"{os.fspath(path)} is {kind}, not a regular file")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a path at which to write a file, and puts what is written there in the place of `path`.

    The yielded path has the same name, in a hidden folder of its own beside `path`. After an error, or an
    interruption, what was at `path` is still there, and the hidden folder is gone. The file has the
    permissions that the umask leaves, for any writer.

    Args:
        path: the file to write.
        durable: return only when the content is on the disk, so that not even a power failure loses it.

    Raises:
        OSError: if the file cannot be written or put in place; with the errno, and the name of `path`.
    """
    try:
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            if not temporary.is_symlink():
                temporary.chmod(0o666 & folder.stat().st_mode)
            if durable:
                _flush_to_disk(temporary)
            os.replace(temporary, path)
            if durable:
                _flush_folder_to_disk(path.parent)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, replacing an existing one atomically; errors as of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields a new, hidden folder in `parent`, and removes it at the end.

    A process that is killed leaves its folder behind; the first folder that another process makes beside it
    sweeps it away.
    """
    sweep(parent)
    name = f"{_OURS}{_host()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}.tmp"
    folder = parent / name
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders that killed processes left in `parent`; once per folder and process."""
    key = (os.getpid(), os.path.realpath(parent))
    if key in _swept:
        return
    _swept.add(key)
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.name.startswith(_OURS)]
    except OSError:  # the caller's own attempt says why
        return
    for name in names:
        match = re.fullmatch(re.escape(_OURS) + r"([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.tmp", name)
        if match and _is_stale(parent / name, match[1], int(match[2]), int(match[3])):
            shutil.rmtree(parent / name, ignore_errors=True)


def _is_stale(folder: Path, host: str, process: int, started: int) -> bool:
    """Check whether a temporary folder is no longer in use.

    Its process has ended or, if that cannot be known, nothing in it has changed for a day.
    """
    if host == _host():
        return _started(process) != started
    try:
        changes = [entry.stat().st_mtime for entry in (folder, *folder.iterdir())]
    except OSError:
        return False
    return time.time() - max(changes) > _DAY


def _host() -> str:
    """The digest of the machine's name and, in a container, of the numbering of its processes."""
    place = platform.node()
    with suppress(OSError):  # on other systems than Linux
        place += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def _started(process: int) -> int | None:
    """Return when a process started; None if there is no such process.

    On Linux, this is in ticks since the machine's start: a time of day changes when the clock is set, and a
    living process would seem to be another one.
    """
    import psutil

    try:
        if psutil.LINUX:
            return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
        return int(psutil.Process(process).create_time())
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder_to_disk(folder: Path) -> None:
    """Let the disk have the names of the files in a folder, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: BaseException) -> int | None:
    """The errno of a failed write, from an error of Python or of a library that wraps it.

    An error that names another file is not changed: reading that file failed, not writing.
    """
    if isinstance(error, ValueError | TypeError):  # of what was to be written
        return None
    while True:
        if isinstance(error, OSError) and error.errno is not None:
            ours = error.filename is None or _OURS in os.fspath(error.filename)
            return error.errno if ours else None
        if found := re.search(r"\(os error (\d+)\)|\bcode: (\d+), kind: ", str(error)):  # as Rust says it
            return int(found[1] or found[2])
        following = error.__cause__ or error.__context__
        if following is None:
            return None
        error = following


@contextmanager
def locked(path: Path, *, seconds: float = 60) -> Iterator[None]:
    """Hold a lock on `path` that all processes respect which ask for it; a hidden file beside it.

    Raises:
        RunError: if another process holds it for longer than `seconds`.
    """
    lock = acquire_lock(path, seconds=seconds)
    try:
        yield
    finally:
        lock.release()


def acquire_lock(path: Path, *, seconds: float = 60) -> filelock.BaseFileLock:
    """Acquire the lock of `locked`; the caller calls its `release`."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        raise RunError(f"{path} is in use by another process, which holds {lock.lock_file}") from None
    return lock


@contextmanager
def exclusive(folder: Path, *, seconds: float = 60) -> Iterator[None]:
    """Hold an existing folder, so that others that ask for it wait; nothing is written to it.

    On systems and network folders that cannot lock a folder, nobody waits.

    Raises:
        RunError: if it is held by another process or thread for longer than `seconds`.
    """
    if fcntl is None:
        yield
        return
    end = time.monotonic() + seconds
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunError(f"{folder} is in use by another run, which writes to it") from None
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
        os.close(descriptor)


def user_cache() -> Path:
    """The package's cache folder: `$XDG_CACHE_HOME/catseg-fast`, by default in `~/.cache`."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_home.is_absolute():  # the XDG specification says to ignore it
        cache_home = Path.home() / ".cache"
    return cache_home / "catseg-fast"
