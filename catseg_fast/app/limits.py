"""Limits of what visitors of the page may take of the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the page; all that is beyond them is refused with a message.

    Attributes:
        names: class names of a call.
        upload: bytes of a picture's file.
        uploads: bytes of all files that are uploaded within two hours, after which they are deleted.
        request: bytes of any other request.
        kept: bytes that are kept of all visitors' pictures and scores; the longest unused go first.
        visitors: number of those of whom something is kept.
        waiting: calls that wait or run.
        waiting_each: of these, those of one session; a page in a browser has one.
        waiting_address: of these, those of one network address.
        seconds: that a call may take.
        seconds_shared: that it may take if another visitor waits.
        connections: requests that are open at a time.
    """

    names: int = 5000
    upload: int = 64 * 2**20
    uploads: int = 2 * 2**30
    request: int = 2 * 2**20
    kept: int = 2 * 2**30
    visitors: int = 32
    waiting: int = 32
    waiting_each: int = 2
    waiting_address: int = 16
    seconds: float = 1200
    seconds_shared: float = 120
    connections: int = 500
