"""Small checkpoint files that differ from valid ones in one place."""

from __future__ import annotations

import io
import zipfile

from support import hostile_files as hostile
from support.hostile_files import call, text


def model(*values: bytes, keys: list[str] | None = None) -> bytes:
    """Return an archive whose state dict holds these values."""
    pairs = b"".join(text(key) + value for key, value in zip(keys or "abcdefgh", values, strict=False))
    return hostile.archive(b"\x80\x02}" + hostile.MARK + pairs + b"u.")


def tensor(storage: bytes, offset: bytes, *sizes: bytes) -> bytes:
    """Return a call that makes a tensor on a storage."""
    rest = hostile.FALSE, hostile.NEW_DICT
    return call("torch._utils._rebuild_tensor_v2", storage, offset, *sizes, *rest)


def entries(*rows: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive with these entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for entry, data in rows:
            archive.writestr(entry, data)
    return file.getvalue()


PICKLE = ("w/data.pkl", hostile.in_model(hostile.TENSOR))
STORED = ("w/data/0", hostile.RAW)
