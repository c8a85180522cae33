"""Choice of `min_score` for a model and a labelled data set, with classes left out in turn.

catseg-fast scenes scenes/held-out --split held-out --count 200 --seed 1000
python examples/demo_model/thresholds.py scenes/held-out --limit 12
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from torch import Tensor

from catseg_fast import CATSeg, Segmentation
from catseg_fast.console import stdout
from catseg_fast.data import FolderDataset
from catseg_fast.evaluation.thresholds import count_scores
from catseg_fast.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a labelled data set, as of `catseg-fast eval --data`")
    parser.add_argument("--weights", default="demo", help="checkpoint, as of `catseg-fast segment`")
    parser.add_argument("--parts", type=int, default=2, help="one in so many classes is left out")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--sliding-window", action="store_true", help="look at crops, too")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    options = parser.parse_args()
    data = FolderDataset(options.data)
    model = CATSeg.from_pretrained(options.weights)

    def segment(image: Tensor, classes: list[str]) -> Segmentation:
        model.set_classes(classes)
        return model.segment(image, sliding_window=options.sliding_window)

    entries = [data[index] for index in range(len(data.names[: options.limit]))]
    counts = count_scores(segment, entries, data.classes, data.ignore_label, options.parts)
    table = Table("min_score", "right", "wrong", "none", "left out: none")
    effects = [counts.effect(step / 20) for step in range(20)]
    for effect in (*effects, best := counts.best()):
        table.add_row(
            f"{effect.min_score:.2f}", f"{effect.right:.3f}", f"{effect.wrong:.3f}",
            f"{effect.unlabelled:.3f}", f"{effect.rejected:.3f}",
        )  # fmt: skip
    stdout.print(table)
    if options.output is not None:
        about = {"weights": options.weights, "pictures": len(entries), "parts": options.parts}
        content = {**about, "best": asdict(best), "effects": [asdict(effect) for effect in effects]}
        write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
