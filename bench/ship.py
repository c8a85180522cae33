"""Add the launch configs that a campaign tuned to the package, where kernels find them without tuning.

    python -m bench.ship results/h200

adds them to catseg_fast/configs/<gpu>/<op>.json, in place of those for the same launches. A campaign ends
with it; run it by hand for results from another machine's checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from catseg_fast.engine import tuner
from catseg_fast.kernels.launch import config_files

PACKAGE = Path(__file__).parent.parent / "catseg_fast" / "configs"
TUNED = Path("cache", "catseg-fast", "configs")  # in a folder of results


def ship(results: Path, package: Path = PACKAGE) -> dict[Path, int]:
    """Add a campaign's tuned configs to the package's; return how many went into each file."""
    shipped = {}
    for path in sorted((results / TUNED).glob("*/*.json")):
        gpu = path.parent.name
        entries = config_files.read(path, gpu)
        target = config_files.config_path(package, gpu, path.stem)
        for entry in entries:
            tuner.save(target, gpu, entry)
        shipped[target] = len(entries)
    return shipped


def describe(shipped: dict[Path, int]) -> str:
    """Return the outcome in one line."""
    folders = ", ".join(sorted({f"catseg_fast/configs/{path.parent.name}" for path in shipped}))
    return f"{sum(shipped.values())} tuned configs are in {folders}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 if there is nothing to ship."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of a campaign's results")
    folder = parser.parse_args(arguments).results
    shipped = ship(folder)
    if not shipped:
        print(f"no tuned configs in {folder / TUNED}", file=sys.stderr)
        return 1
    print(describe(shipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
