"""The refusal of a bad checkpoint file: soon, and with a message that can be printed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from catseg_fast.checkpoints.checkpoint import read_checkpoint

SECONDS = 5  # of CPU time that a refusal may take


def assert_refused(path: Path, data: bytes | None, reason: str) -> None:
    """Check that a file is refused for this reason; None as `data` leaves the file as it is."""
    if data is not None:
        path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=reason) as caught:
        read_checkpoint(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert "weights_only" not in message
