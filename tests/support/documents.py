"""Code blocks of README and docs/."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from catseg_fast import VARIANTS, CATSeg
from catseg_fast.config import CLIPConfig
from catseg_fast.data.scenes import write_dataset
from catseg_fast.output.video import VideoWriter

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").rglob("*.md")))
STREET = ROOT / "examples" / "street.png"
PICTURES = (
    "photo.jpg", "photos/a.jpg", "photos/b.jpg", "frames/1.jpg", "aerial.tif", "examples/street.png",
)  # fmt: skip
SMALL = (320, 224)  # pixels of its copies, width and height
SCENE = ROOT / "examples" / "scene.jpg"
TINY = replace(
    VARIANTS["v2-vitb"],
    clip=CLIPConfig(
        embed_dim=32, image_size=64, input_size=384, patch_size=16, vision_width=64, vision_layers=9,
        vision_heads=1, text_width=64, text_heads=1, text_layers=1,
    ),
    appearance_guidance_dim=32, hidden_dim=32, num_layers=1, decoder_dims=(16, 16),
    decoder_guidance_proj_dims=(8, 8),
)  # fmt: skip


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return language and code of each block that names its language, without the indent of a list."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [
        (language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found
    ]


def calls(code: str) -> list[list[str]]:
    """Return the words of each command in a shell block, without comments."""
    lines = [line for line in code.splitlines() if line.strip()]
    return [shlex.split(call, comments=True) for line in lines for call in line.split(" && ")]


def make_checkout(folder: Path) -> None:
    """Write the files that the documents name; `model_base.pth` has a tiny model's weights."""
    torch.manual_seed(0)
    weights = CATSeg(TINY).state_dict()
    torch.save({"model": weights}, folder / "model_base.pth")
    clip = {name: tensor.contiguous() for name, tensor in weights.items() if ".clip_model." in name}
    save_file(clip, folder / "clip.safetensors")
    (folder / "classes.txt").write_text("sky\ntree\n")
    with Image.open(STREET) as street:
        small = street.convert("RGB").resize(SMALL)
    for name in (
        "photo.jpg",
        "photos/a.jpg",
        "photos/b.jpg",
        "frames/1.jpg",
        "aerial.tif",
        "examples/street.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        small.save(folder / name)
    writer = VideoWriter(folder / "clip.mp4", SMALL[::-1], Fraction(25), "")
    for index in range(3):
        writer.add(np.asarray(small), Fraction(index, 25))
    writer.close()
    shutil.copy(SCENE, folder / "examples")
    for name in ("ade150", "coco-stuff"):
        write_dataset(folder / name, "held-out", 2, size=(96, 96))
