"""Results as one Markdown table and plots, or compared with earlier ones.

    python -m bench.report results/*.json                      table and plots, into bench/results/report/
    python -m bench.report --compare old.json new.json         exits with 1 if one is slower by 5 %

Files are pytest-benchmark's (`--benchmark-json`), those of `--records` (`.jsonl`), or those of
`bench/results/h200/`, whose own report is in `bench/results/h200/report/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import plots, raw_runs, records, tables
from catseg_fast.files import write_text

OUTPUT = Path(__file__).parent / "results" / "report"


def write(paths: Sequence[Path], folder: Path) -> str:
    """Write `table.md` and, if matplotlib is installed, the plots into a folder; return the table.

    Raises:
        ValueError: if the files hold no records.
    """
    found = records.read(paths) + raw_runs.read(paths)
    if not found:
        raise ValueError(f"no results in {', '.join(map(str, paths))}")
    text = tables.summary(found)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", text)
    try:
        plots.draw_all(found, folder)
    except ModuleNotFoundError as error:
        return f"{text}\nNo plots: {error}; pip install -e '.[bench]' has it\n"
    return text


def compare(old: Path, new: Path) -> bool:
    """Print a comparison of two files; return whether nothing is slower than noise explains.

    Raises:
        ValueError: if they cannot be compared.
    """
    before, after = records.read([old]), records.read([new])
    found = records.compare(before, after)
    print(tables.changes(found))
    if lost := records.missing(before, after):
        print(f"not in {new}: {', '.join(lost)}")
    slower = sum(change.slower for change in found)
    print(f"{slower} of {len(found)} slower by more than {records.SLOWER:.0%}")
    return slower == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 for a slow-down, 2 for files that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="files with results")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the table and the plots")
    options = parser.parse_args(arguments)
    if bool(options.results) == bool(options.compare):
        parser.error("give either results, or --compare with two files")
    try:
        if options.compare:
            return 0 if compare(*options.compare) else 1
        print(write(options.results, options.output))
        print(f"written to {options.output}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
