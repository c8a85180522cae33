"""Train the demo model's CLIP from scratch: a name for every patch of generated scenes.

    catseg-fast scenes scenes/train --split train --count 5000
    python examples/demo_model/pretrain_clip.py --data scenes/train --output clip.safetensors --minutes 30

Each patch's feature is classified by the text features of whole vocabularies (cross-entropy over cosines): of
full names ("striped red ring") and of shorter ones ("red ring", "striped thing", "ring"), any word of which
may be replaced by its synonym, but never two. Most of the time a quarter of the patches is looked at, a
window around a thing, since few patches are of things. Shapes take longest to learn; two things help:
positions start as sines and cosines, which tell neighbours from the first step on, and a head that is thrown
away afterwards says in the middle of the tower which patches around a patch are of its own class. The rest of
the model is saved as it was initialised.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from catseg_fast import CATSeg
from catseg_fast.checkpoints.checkpoint import load_into, read_checkpoint
from catseg_fast.config import VARIANTS
from catseg_fast.data.scenes.dataset import SPLITS
from catseg_fast.data.scenes.words import GROUNDS, SYNONYMS, Composition
from catseg_fast.files import replacing
from catseg_fast.reference.clip import DenseCLIP
from catseg_fast.reference.model import normalise
from catseg_fast.text.prompts import get_templates, tokenize

DEMO = VARIANTS["demo"]
SIDE, GRID, WINDOW = 384, 24, 12
PARTS = ((0, 1, 2), (1, 2), (0, 2), (2,), (1,), (0,))  # which of pattern, colour and shape a name has
WEIGHTS = (1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 4.0)  # of the vocabularies' losses, and of kinship's
MIDDLE, REACH = 2, 6  # the block behind which kinship is read, and how many patches away
(TEMPLATE,) = get_templates(DEMO.prompt_ensemble)


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Random views of scenes: pixels uint8 `[3, 384, 384]`, and labels of 4x4 points a patch `[576, 16]`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.images = sorted((folder / "images").iterdir())
        self.annotations = folder / "annotations"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        with Image.open(path) as image, Image.open(self.annotations / f"{path.stem}.png") as annotation:
            side = int(SIDE / self.random.uniform(1, 1.8))
            left, top = self.random.integers(0, SIDE - side + 1, 2)
            box = (left, top, left + side, top + side)
            pixels = np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
            points = np.array(annotation.crop(box).resize((4 * GRID, 4 * GRID), Image.Resampling.NEAREST))
        if self.random.random() < 0.5:
            pixels, points = pixels[:, ::-1].copy(), points[:, ::-1].copy()
        labels = torch.from_numpy(points.astype(np.int64))
        labels = labels.view(GRID, 4, GRID, 4).permute(0, 2, 1, 3).reshape(GRID * GRID, 16)
        return torch.from_numpy(pixels).permute(2, 0, 1), labels


@dataclass
class Vocabulary:
    """Names that tell classes apart by some of their words.

    Attributes:
        tokens: of each name's prompts: as it is, and with one word replaced.
        index: each class's name `[T]`.
    """

    tokens: list[Tensor]
    index: Tensor

    @classmethod
    def of(cls, classes: tuple[str | Composition, ...], parts: tuple[int, ...]) -> Vocabulary:
        names = [_words(thing, parts) for thing in classes]
        unique = list(dict.fromkeys(names))
        tokens = [tokenize([TEMPLATE.format(p) for p in _phrases(words)], 32) for words in unique]
        return cls(tokens, torch.tensor([unique.index(words) for words in names]))

    def draw(self) -> Tensor:
        """Token ids of one prompt a name."""
        return torch.stack(
            [ids[torch.randint(len(ids), ()) if torch.rand(()) < 0.5 else 0] for ids in self.tokens]
        )


def _words(thing: str | Composition, parts: tuple[int, ...]) -> tuple[str, ...]:
    if isinstance(thing, str):
        return (thing,)
    words = tuple(thing.words[part] for part in parts)
    return words if 2 in parts else (*words, "thing")


def _phrases(words: tuple[str, ...]) -> list[str]:
    variants = [words] + [
        (*words[:i], SYNONYMS[word], *words[i + 1 :]) for i, word in enumerate(words) if word in SYNONYMS
    ]
    return [" ".join(variant) for variant in variants]


def choose_window(labels: Tensor, side: int) -> Tensor:
    """Indices `[B, side * side]` of the patches in a square window, around a thing if there is one."""
    weights = 1e-3 + (labels >= len(GROUNDS)).any(dim=2).float()
    centre = torch.multinomial(weights, 1)
    row, column = ((x - side // 2).clamp(0, GRID - side) for x in (centre // GRID, centre % GRID))
    steps = torch.arange(side)
    return ((row[:, :, None] + steps[:, None]) * GRID + column[:, :, None] + steps).flatten(1)


def sines_and_cosines(width: int) -> Tensor:
    """Fixed embedding `[1 + GRID * GRID, width]` of rows and columns; zero for the class token."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)
    return torch.cat([grid.new_zeros(1, width), grid])


def encode_patches(clip: DenseCLIP, images: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """`encode_dense` of the patches `seen [B, N]` alone, as if there were no others.

    Returns:
        Features `[B, N, embed_dim]`, and tokens `[B, N, width]` from the middle of the tower.
    """
    visual = clip.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2) + clip.position_embedding(GRID, GRID)[1:]
    x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))
    first = (visual.class_embedding + clip.position_embedding(GRID, GRID)[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first.to(x.dtype), x], dim=1))
    *blocks, last = visual.transformer.resblocks
    for index, block in enumerate(blocks):
        x = block(x)
        if index == MIDDLE:
            middle = x[:, 1:]
    return (visual.ln_post(clip._value_path(last, x)) @ visual.proj)[:, 1:].float(), middle


def kinship_loss(head: nn.Module, tokens: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Binary cross-entropy of which patches around each one are of its class, among those that are seen."""
    classes = labels.mode(dim=2).values  # B, GRID * GRID
    known = torch.zeros_like(classes).scatter_(1, seen, 1)
    around = F.unfold(
        torch.stack([classes.float(), known.float()], dim=1).view(-1, 2, GRID, GRID),
        2 * REACH + 1,
        padding=REACH,
    ).view(len(labels), 2, -1, GRID * GRID)  # B, 2, offsets, patches; zero outside: not known
    own, known = around.gather(3, seen[:, None, None].expand(-1, 2, around.shape[2], -1)).unbind(1)
    same = (own == classes.gather(1, seen)[:, None]).float()
    logits = head(tokens).float().transpose(1, 2)
    return F.binary_cross_entropy_with_logits(logits, same, known) * known.numel() / known.sum()


def losses_of(
    model: CATSeg,
    head: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    seen: Tensor,
    vocabularies: list[Vocabulary],
) -> Tensor:
    """Mean cross-entropy over the patches `seen`, of each vocabulary, and the kinship loss."""
    clip = model.clip_model
    features, middle = encode_patches(clip, normalise(pixels.float())[0], seen)
    features = F.normalize(features, dim=-1).flatten(0, 1)
    kinship = kinship_loss(head, middle, labels, seen)
    labels = labels.gather(1, seen[..., None].expand(-1, -1, labels.shape[2]))
    drawn = [vocabulary.draw() for vocabulary in vocabularies]
    texts = torch.cat(drawn)
    texts = texts[:, : int(texts.argmax(-1).max()) + 1]
    sizes = [len(ids) for ids in drawn]
    text = clip.encode_text(texts, normalize=True).float()
    with torch.autocast("cpu", enabled=False):
        logits = clip.logit_scale.exp() * features @ text.T
    points = labels.flatten(0, 1)
    losses = []
    for part, vocabulary in zip(logits.split(sizes, dim=1), vocabularies, strict=True):
        target = torch.zeros_like(part).scatter_add_(
            1, vocabulary.index[points], torch.full(points.shape, 1 / points.shape[1])
        )
        losses.append(F.cross_entropy(part, target))
    return torch.stack([*losses, kinship])


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, over and over."""
    while True:
        yield from loader


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    model = CATSeg(DEMO, clip_finetune="full")
    clip = model.clip_model.requires_grad_(True).train()
    head = nn.Linear(model.variant.clip.vision_width, (2 * REACH + 1) ** 2)
    with torch.no_grad():
        clip.visual.positional_embedding += 0.2 * sines_and_cosines(model.variant.clip.vision_width)
    if options.init:
        load_into(model, read_checkpoint(options.init), str(options.init))
    classes = SPLITS["train"].classes
    vocabularies = [Vocabulary.of(classes, parts) for parts in PARTS]
    parameters = [*clip.parameters(), *head.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    loader = DataLoader(
        Scenes(options.data, options.seed), options.batch_size, shuffle=True, drop_last=True,
        num_workers=options.workers, persistent_workers=options.workers > 0,
    )  # fmt: skip
    start, total = time.monotonic(), 60 * options.minutes
    log = options.output.with_suffix(".jsonl").open("a", encoding="utf-8")
    for step, (pixels, labels) in enumerate(batches(loader), 1):
        share = (time.monotonic() - start) / total  # of the time
        if share >= 1:
            break
        rate = options.lr * min(1, step / 200) * (0.02 + 0.98 * np.cos(share * np.pi / 2) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            seen = choose_window(labels, GRID if share > options.windows else WINDOW)
            losses = losses_of(model, head, pixels, labels, seen, vocabularies)
            loss = losses @ torch.tensor(WEIGHTS) / sum(WEIGHTS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(100))
        if step % 20 == 0:
            row = {
                "step": step,
                "minutes": round((time.monotonic() - start) / 60, 2),
                "loss": [round(x, 3) for x in losses.tolist()],
                "rate": round(rate, 6),
                "scale": round(clip.logit_scale.exp().item(), 2),
            }
            print(json.dumps(row), file=log, flush=True)
        if step % 250 == 0:
            save(model, options.output)
    save(model, options.output)


def save(model: CATSeg, path: Path) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="scenes of the split 'train'")
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--init", type=Path, help="weights to start from")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=float, default=0.85, help="share of the time with windows")
    parser.add_argument("--workers", type=int, choices=(0, 1), default=1, help="processes that load scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
