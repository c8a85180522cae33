"""Accuracy of pattern, colour and shape of the demo model's CLIP, patch by patch.

catseg-fast scenes scenes/held-out-200 --split held-out-200 --count 200 --seed 1000
python examples/demo_model/probe_clip.py scenes/held-out-200 clip.safetensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from catseg_fast import CATSeg
from catseg_fast.console import stdout
from catseg_fast.data.folder import FolderDataset
from catseg_fast.data.scenes import SPLITS
from catseg_fast.data.scenes.attributes import AttributeCounts
from catseg_fast.reference.model import as_map, normalise


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="scenes that `catseg-fast scenes` wrote")
    parser.add_argument("weights", nargs="+", help="weights of the demo variant")
    parser.add_argument("--limit", type=int, help="only the first so many scenes")
    options = parser.parse_args()
    split = json.loads((options.data / "scenes.json").read_text(encoding="utf-8"))["split"]
    data = FolderDataset(options.data)
    for weights in options.weights:
        model = CATSeg.from_pretrained(weights, data.classes, variant="demo")
        clip, text = model.clip_model, F.normalize(model.text_features()[:, 0], dim=-1)
        counts = AttributeCounts(SPLITS[split].classes)
        for index in range(min(len(data), options.limit or len(data))):
            entry = data[index]
            features = as_map(clip.encode_dense(normalise(entry["image"][None].float())[0])[0])[0]
            found = torch.einsum("chw,tc->thw", F.normalize(features, dim=0), text).argmax(0)
            height, width = (n // f for n, f in zip(entry["sem_seg"].shape, found.shape, strict=True))
            points = entry["sem_seg"].unfold(0, height, height).unfold(1, width, width).flatten(2)
            pure = (points == points[..., :1]).all(2)  # patches with one class
            counts.add(found[pure][None].numpy(), points[..., 0][pure][None].numpy())
        words = ", ".join(
            f"{name} {one.accuracy:.3f} ({one.among_alike:.3f} among alike, chance {one.chance:.3f})"
            for name, one in counts.accuracies().items()
        )
        stdout.print(f"{weights}: all three {counts.names:.3f}; {words}", soft_wrap=True)


if __name__ == "__main__":
    main()
