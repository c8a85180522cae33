"""Baselines of the demo model on generated scenes: the nearest colour, and the untrained model.

catseg-fast scenes scenes/held-out --split held-out --count 200 --seed 1000
python examples/demo_model/baselines.py scenes/held-out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.console import stdout
from catseg_fast.data.folder import FolderDataset
from catseg_fast.data.scenes import SPLITS
from catseg_fast.data.scenes.baseline import NearestColour
from catseg_fast.evaluation.report import results_table
from catseg_fast.evaluation.run import evaluate, model_segmenter, summarise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="scenes of a held-out split")
    parser.add_argument("--limit", type=int, help="only the first so many")
    options = parser.parse_args()
    data = FolderDataset(options.data)
    split = json.loads((options.data / "scenes.json").read_text(encoding="utf-8"))["split"]
    nearest = NearestColour(SPLITS[split].classes)

    def by_colour(image: Tensor) -> Tensor:
        return torch.from_numpy(nearest(image.permute(1, 2, 0).numpy()))

    torch.manual_seed(0)
    untrained = CATSeg("demo", data.classes, sliding_window=False).eval()
    rows = []
    for name, segmenter in (("nearest colour", by_colour), ("untrained", model_segmenter(untrained))):
        records = evaluate(data, segmenter, limit=options.limit)
        rows.append((name, summarise(records, len(data.classes))))
    stdout.print(results_table(rows))


if __name__ == "__main__":
    main()
