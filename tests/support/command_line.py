"""Runs of the command line in this process, with the checkpoint of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from catseg_fast import CATSeg
from catseg_fast.cli import main as cli
from catseg_fast.config import VARIANTS

V2_VITB = VARIANTS["v2-vitb"]
TINY = replace(
    V2_VITB,
    name="tiny",
    clip=replace(
        V2_VITB.clip, embed_dim=16, vision_width=64, vision_layers=9, vision_heads=1, vision_mlp_ratio=1.0,
        text_width=64, text_heads=1, text_layers=1,
    ),
    appearance_guidance_dim=16, decoder_guidance_dims=(8, 8), hidden_dim=32, num_layers=1,
    text_guidance_proj_dim=16, appearance_guidance_proj_dim=8, decoder_dims=(32, 16),
    decoder_guidance_proj_dims=(4, 4),
)  # fmt: skip
SUFFIXES = (".json", ".labels.png", ".overlay.png")


def save_tiny_checkpoint(folder: Path) -> Path:
    """Write a tiny model in upstream's format to `tiny.pth`."""
    torch.manual_seed(0)
    path = folder / "tiny.pth"
    torch.save({"model": CATSeg(TINY).state_dict()}, path)
    return path


def draw_photo(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> None:
    """Write a picture of random, smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def run(*arguments: object) -> Result:
    """Run `catseg-fast` with these arguments."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="catseg-fast")


def lines_of(stderr: str) -> list[str]:
    """Return lines that are not empty; some versions of rich end a hidden progress bar with an empty line."""
    return [line for line in stderr.splitlines() if line]


def written(folder: Path) -> set[str]:
    """Return the names of all files in a folder, including hidden ones."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def outputs(*stems: str) -> set[str]:
    """Return the names of the files that `segment` writes for images of these stems."""
    return {stem + suffix for stem in stems for suffix in SUFFIXES}
