"""Progress bars: when they are shown, and when not."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from catseg_fast import console


def test_a_bar_appears_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=shown, force_terminal=True, width=80))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.late_progress("Encoding class names") as advance:
        advance(10, 100)
        assert not shown.getvalue()
        now[0] = 2.1
        advance(30, 100)
    assert "Encoding class names" in shown.getvalue()
    assert "30/100" in shown.getvalue()


def test_no_bar_where_another_is_on_show_or_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(console, "stderr", Console(file=shown, force_terminal=terminal, width=80))
        with console.image_progress("Segmenting") as outer, console.late_progress("Texts", 0) as advance:
            outer(1, 2)
            advance(1, 2)
        assert ("1/2" in shown.getvalue()) == terminal
