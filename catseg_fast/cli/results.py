"""Tables and the closing line that `segment` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from catseg_fast.console import stdout

if TYPE_CHECKING:
    from catseg_fast.cli.batch import Outcome

LISTED = 20  # most pictures with a line for each; with more, the largest classes are listed instead


def print_results(outcomes: Sequence[Outcome], total: int, seconds: float) -> None:
    """Print the results of the pictures that did not fail, out of `total`."""
    if outcomes:
        if total <= LISTED:
            stdout.print_table(_results_table(outcomes), paths=(0, 3))
        else:
            stdout.print_table(_classes_table(outcomes), names=(0,))
    if total > 1:
        stdout.print(_summary(outcomes, total, seconds))


def _top_classes(summary: list[dict[str, Any]], count: int = 3) -> str:
    largest = sorted(summary, key=lambda entry: -entry["share"])
    return ", ".join(f"{entry['name'].partition(',')[0]} {entry['share']:.0%}" for entry in largest[:count])


def _results_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a table with one row per picture."""
    table = Table("image", "largest classes", "time", "overlay")
    for outcome in outcomes:
        seconds = "up to date" if outcome.seconds is None else f"{outcome.seconds:.2f} s"
        cells = (
            str(outcome.picture.path), _top_classes(outcome.summary or []), seconds,
            str(outcome.picture.result(outcome.overlay)),
        )  # fmt: skip
        table.add_row(*cells)
    return table


def _classes_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a table of the largest classes; all pictures have the same weight."""
    shares: dict[str, list[float]] = {}
    for outcome in outcomes:
        for entry in outcome.summary or []:
            shares.setdefault(entry["name"], []).append(entry["share"])
    table = Table("class", "pictures", "mean share", title=f"{len(shares)} classes occur; the largest are")
    for name, found in sorted(shares.items(), key=lambda item: -sum(item[1]))[:LISTED]:
        table.add_row(name, str(len(found)), f"{sum(found) / len(outcomes):.1%}")
    return table


def _summary(outcomes: Sequence[Outcome], total: int, seconds: float) -> str:
    """Return a line on how many of `total` pictures were segmented, were up to date, and failed."""
    done = sum(outcome.seconds is not None for outcome in outcomes)
    speed = f" ({done / seconds:.2f} img/s)" if done else ""
    kept, failed = len(outcomes) - done, total - len(outcomes)
    parts = [f"{done} segmented in {seconds:.1f} s{speed}"]
    parts += [f"{kept} up to date"] * bool(kept) + [f"{failed} failed"] * bool(failed)
    return ", ".join(parts)
