"""Accuracy of pattern, colour and shape on generated scenes, from their label maps.

catseg-fast scenes scenes/held-out-200 --split held-out-200 --count 200 --seed 1000
catseg-fast eval --data scenes/held-out-200 --whole --output evaluated/held-out-200
python examples/demo_model/attributes.py scenes/held-out-200 evaluated/held-out-200/auto-float32.labels
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from catseg_fast.console import stdout
from catseg_fast.data.folder import read_index_map
from catseg_fast.data.scenes import SPLITS
from catseg_fast.data.scenes.attributes import AttributeCounts
from catseg_fast.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="scenes that `catseg-fast scenes` wrote")
    parser.add_argument("labels", type=Path, help="the label maps that `catseg-fast eval` wrote of them")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    options = parser.parse_args()
    about = json.loads((options.data / "scenes.json").read_text(encoding="utf-8"))
    counts = AttributeCounts(SPLITS[about["split"]].classes)
    paths = sorted(options.labels.glob("*.png"))
    if not paths:
        parser.error(f"labels: no label map (*.png) is in {options.labels}")
    for path in paths:
        counts.add(read_index_map(path), read_index_map(options.data / "annotations" / path.name))
    found = counts.accuracies()
    table = Table("", "right", "right where the other two are", "chance of that")
    for name, one in found.items():
        table.add_row(name, f"{one.accuracy:.3f}", f"{one.among_alike:.3f}", f"{one.chance:.3f}")
    table.add_row("all three", f"{counts.names:.3f}", "", "")
    stdout.print(table)
    if options.output is not None:
        content = {
            **about,
            "scenes": len(paths),
            "all": counts.names,
            **{name: asdict(x) for name, x in found.items()},
        }
        write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
