"""Content of pictures that are not files on this machine: http and https URLs, fetched within limits."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from catseg_fast.errors import InputError, RunError

URL_BYTES = 2**28  # the largest picture that is fetched
URL_SECONDS = 60.0  # for the whole of it
CONNECT_SECONDS = 15.0  # without an answer, or without any new bytes
_BLOCK = 2**16
_WEB = ("http", "https")


def is_url(image: str) -> bool:
    """Check whether a string is a file, http or https URL, and not a path."""
    return urlsplit(image).scheme.lower() in (*_WEB, "file") and "://" in image


def local_path(url: str, name: str) -> Path | None:
    """Return the path of a file URL; None for an http or https URL.

    Raises:
        InputError: if a file URL names another machine.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() in _WEB:
        return None
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"{name}: {url!r} is on another machine; a file URL starts with file:///")
    return Path(urllib.request.url2pathname(parts.path))


def fetch(url: str, name: str) -> bytes:
    """Return the content of an http or https URL.

    Raises:
        RunError: if the server cannot be reached, answers with an error or takes too long.
        InputError: if the content is larger than `URL_BYTES`.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "catseg-fast", "Accept": "image/*, */*"})
    deadline = time.monotonic() + URL_SECONDS
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            announced = answer.headers.get("Content-Length", "")
            if announced.isdecimal() and int(announced) > URL_BYTES:
                raise _too_large(name, url, f"{int(announced) / 2**20:.0f} MiB")
            return _read(answer, url, name, deadline)
    except urllib.error.HTTPError as error:
        raise RunError(f"{name}: {url} answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise RunError(f"{name}: {url} did not answer within {CONNECT_SECONDS:g} s") from error
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            reason = f"no answer within {CONNECT_SECONDS:g} s"
        raise RunError(f"{name}: cannot reach {url}: {reason}") from error


def _read(answer: IO[bytes], url: str, name: str, deadline: float) -> bytes:
    """Read an answer's content within the limits."""
    content = bytearray()
    while block := answer.read1(_BLOCK) if hasattr(answer, "read1") else answer.read(_BLOCK):
        content += block
        if len(content) > URL_BYTES:
            raise _too_large(name, url, "more")
        if time.monotonic() > deadline:
            raise RunError(f"{name}: {url} took longer than {URL_SECONDS:g} s; download it first")
    expected = getattr(answer, "length", None)  # what http.client still waits for
    if expected:
        raise RunError(f"{name}: {url} ended {expected} bytes early")
    return bytes(content)


def _too_large(name: str, url: str, size: str) -> InputError:
    limit = f"{URL_BYTES / 2**20:.0f} MiB"
    return InputError(f"{name}: {url} holds {size}, and at most {limit} are fetched; download it first")


def describe_source(image: object) -> str:
    """Return a name for content without a path in errors: a file object's name, or its type."""
    name = getattr(image, "name", None)
    if isinstance(name, str | os.PathLike):
        return repr(os.fspath(name))
    if isinstance(image, bytes | bytearray | memoryview):
        return f"the {len(image)} bytes"
    return f"the {type(image).__name__}"
