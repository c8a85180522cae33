"""A picture through the command line at full size, from a checkpoint in upstream's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.cli.main import app
from catseg_fast.inference.images import load_image
from catseg_fast.reference.model import CATSeg as ReferenceCATSeg
from support.golden_rule import fill

STREET = Path(__file__).parent.parent / "examples" / "street.png"
CLASSES = ["sky", "tree", "house", "road", "car, automobile", "person"]


@torch.no_grad()
def test_segment_at_full_size_equals_the_reference(tmp_path: Path) -> None:
    reference = ReferenceCATSeg("v2-vitb", CLASSES).eval()
    fill(reference)
    weights = tmp_path / "model_base.pth"
    torch.save({"model": reference.state_dict(), "iteration": 80000}, weights)
    arguments = ["segment", str(STREET), "--classes", "; ".join(CLASSES), "--weights", str(weights)]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output

    image = load_image(STREET)
    height, width = image.shape[-2:]
    probabilities = reference([{"image": image, "height": height, "width": width}])[0]["sem_seg"]
    best = probabilities.topk(2, dim=0)
    segmentation = CATSeg.from_pretrained(weights, CLASSES, device="cpu").segment(STREET)
    torch.testing.assert_close(segmentation.scores, best.values[0], rtol=0, atol=1e-4)

    with Image.open(tmp_path / "out" / "street.labels.png") as written:
        labels = torch.from_numpy(np.array(written).astype(np.int64))
    assert torch.equal(labels, segmentation.labels.long())
    clear = best.values[0] - best.values[1] > 2e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], best.indices[0][clear])
