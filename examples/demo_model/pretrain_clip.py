"""Train the demo model's CLIP: a name for every patch of generated scenes.

    catseg-fast scenes scenes/train --split train --count 5000
    torchrun --nproc-per-node 2 examples/demo_model/pretrain_clip.py --data scenes/train \\
        --init start.safetensors --output clip.safetensors

Each patch's feature is classified by the text features of whole vocabularies (cross-entropy over cosines): of
full names ("striped red ring") and of shorter ones ("red ring", "striped thing", "ring"), of which any word,
but never two, may be replaced by its synonym. Some of these names have no word but the shape's, so that it
cannot be left out; and full names that differ in the shape only are each other's negatives.

Colours and patterns are in a patch, shapes are not: they take most of the training. Four losses guide the
image tower to them; their heads are thrown away afterwards.

- Silhouettes: after the second block, each patch tells which of the 12x12 points around it are of its class.
- Companions: one attention head of the third block, and one of the fourth, is to look at patches of the
  patch's own class, so that a patch can gather what the whole thing's outline is like.
- Centres: after the fourth block, each patch tells where the middle of its class's patches is.
- Shapes: after the fourth and the fifth block, a linear layer reads the shape directly.

Most of the time the tower sees windows of 12x12 patches around things, at the end whole pictures of 24x24.
The rest of the model is saved as it was. A run that was interrupted goes on where its last state was saved;
SIGTERM saves it first. Where other programs run besides, two processes of one thread each (torchrun) share a
step better than one process of two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from catseg_fast import CATSeg
from catseg_fast.checkpoints.checkpoint import load_into, read_checkpoint
from catseg_fast.config import VARIANTS
from catseg_fast.data.scenes.dataset import SPLITS, Thing
from catseg_fast.data.scenes.words import GROUNDS, SHAPES, SYNONYMS
from catseg_fast.files import replacing
from catseg_fast.reference.clip import DenseCLIP
from catseg_fast.reference.model import normalise
from catseg_fast.text.prompts import get_templates
from catseg_fast.text.tokens import tokenize

DEMO = VARIANTS["demo"]
WIDTH, PATCH, GRID, WINDOW = DEMO.clip.vision_width, DEMO.clip.patch_size, 24, 12
POINTS = 4  # per side of a patch, at which its labels are taken
ZOOM_OF_WINDOWS, ZOOM_OF_PICTURES = (0.8, 1.3), (1.0, 1.7)
MUON = 3.0  # learning rate of the blocks' matrices, times that of everything else
PARTS = ((0, 1, 2), (1, 2), (0, 2), (2,), (1,), (0,))  # which of pattern, colour and shape a name has
SILHOUETTE, COMPANIONS, CENTRE, READ = 1, (2, 3), 3, (3, 4)  # the blocks that the guiding losses look at
# Of the names in full, the shapes' and one more vocabulary drawn each step; and of the guiding losses.
WEIGHTS = (1.0, 2.0, 1.0, 1.0, 0.5, 0.5, 1.0)
SEEN = 96  # patches of a window that the tower sees
(TEMPLATE,) = get_templates(DEMO.prompt_ensemble)
CLASSES = SPLITS["train"].classes


class Views:
    """Random views of scenes that are held in memory, without end.

    Args:
        folder: of a data set that `catseg-fast scenes` wrote.
        rank, count: this process and how many there are; each holds a part of the scenes.
        seed: decides everything.
    """

    def __init__(self, folder: Path, rank: int, count: int, seed: int) -> None:
        self.random = np.random.default_rng([seed, rank])
        paths = sorted((folder / "annotations").iterdir())[rank::count]
        if not paths:
            raise ValueError(f"data: {folder} has too few scenes for {count} processes")
        side = len(_read(paths[0]))
        self.annotations = np.empty((len(paths), side // 2, side // 2), np.uint16)
        self.images = np.empty((len(paths), side, side, 3), np.uint8)
        for index, path in enumerate(paths):
            self.annotations[index] = _read(path)[1::2, 1::2]
            self.images[index] = _read(folder / "images" / f"{path.stem}.jpg")

    def batch(self, count: int, side: int, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of `side x side` patches, of which those are looked at that are of things or near some.

        Returns:
            Pixels of the patches, uint8 `[count, patches, 3 * 16 * 16]`; classes of the 4x4 points of all
            patches `[count, side, side, 4, 4]`; and the places of the patches, in the view and in the grid of
            24x24 `[2, count, patches]`.
        """
        pixels, points, places = zip(*(self._view(side, patches) for _ in range(count)), strict=True)
        return torch.stack(pixels), torch.stack(points), torch.stack(places, dim=1)

    def _view(self, side: int, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        random, number = self.random, int(self.random.integers(len(self.images)))
        image, labels = self.images[number], self.annotations[number]
        zoom = ZOOM_OF_PICTURES if side == GRID else ZOOM_OF_WINDOWS
        length = int(side * PATCH / random.uniform(*zoom))
        top, left = self._corner(labels, length, whole=side == GRID)
        scaled = Image.fromarray(image[top : top + length, left : left + length]).resize(
            (side * PATCH, side * PATCH), Image.Resampling.BILINEAR
        )
        pixels = np.asarray(scaled).reshape(side, PATCH, side, PATCH, 3)
        steps = (np.arange(side * POINTS) + 0.5) * length / (side * POINTS)
        rows, columns = (((start + steps) / 2).astype(np.intp) for start in (top, left))
        points = labels[rows[:, None], columns].astype(np.int64)
        if random.random() < 0.5:
            pixels, points = pixels[:, :, ::-1, ::-1], points[:, ::-1]
        pixels = pixels.transpose(0, 2, 4, 1, 3).reshape(side * side, -1)
        points = np.ascontiguousarray(points.reshape(side, POINTS, side, POINTS).transpose(0, 2, 1, 3))

        things = np.pad((points >= len(GROUNDS)).any((2, 3)), 1)
        near = np.lib.stride_tricks.sliding_window_view(things, (3, 3)).any((2, 3))
        chosen = np.sort(np.argsort(random.random(side * side) - near.flatten())[:patches])
        row, column = random.integers(0, GRID - side + 1, 2)
        places = (row + chosen // side) * GRID + column + chosen % side
        return (
            torch.from_numpy(pixels[chosen]),
            torch.from_numpy(points),
            torch.from_numpy(np.stack([chosen, places])),
        )

    def _corner(self, labels: NDArray[Any], length: int, whole: bool) -> NDArray[np.intp]:
        """Return the corner of a square of `length` pixels, around a thing unless it is `whole`."""
        last = 2 * len(labels) - length
        things = np.argwhere(labels[::4, ::4] >= len(GROUNDS))
        if whole or not len(things):
            return self.random.integers(0, last + 1, 2)
        centre = 8 * things[self.random.integers(len(things))]
        jitter = self.random.integers(-length // 5, length // 5 + 1, 2)
        return np.clip(centre + jitter - length // 2, 0, last)


def _read(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(image)


class Vocabulary:
    """Names that tell classes apart by some of their words.

    Attributes:
        tokens: of each name's prompts: as it is, and with one word replaced.
        index: each class's name `[T]`.
    """

    def __init__(self, parts: tuple[int, ...]) -> None:
        names = [_words(thing, parts) for thing in CLASSES]
        unique = list(dict.fromkeys(names))
        self.tokens = [tokenize([TEMPLATE.format(p) for p in _phrases(words)], 32) for words in unique]
        self.index = torch.tensor([unique.index(words) for words in names])

    def draw(self) -> Tensor:
        """Token ids of one prompt per name."""
        return torch.stack(
            [ids[torch.randint(len(ids), ()) if torch.rand(()) < 0.5 else 0] for ids in self.tokens]
        )


def _words(thing: Thing, parts: tuple[int, ...]) -> tuple[str, ...]:
    if isinstance(thing, str):
        return (thing,)
    words = tuple(thing.words[part] for part in parts)
    return words if 2 in parts else (*words, "thing")


def _phrases(words: tuple[str, ...]) -> list[str]:
    variants = [words] + [
        (*words[:i], SYNONYMS[word], *words[i + 1 :]) for i, word in enumerate(words) if word in SYNONYMS
    ]
    return [" ".join(variant) for variant in variants]


class Guide(nn.Module):
    """The heads of the guiding losses."""

    def __init__(self) -> None:
        super().__init__()
        self.silhouette = nn.Linear(WIDTH, (3 * POINTS) ** 2)
        self.centre = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.shapes = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SHAPES))) for _ in READ
        )
        shapes = [-100 if isinstance(thing, str) else thing.shape for thing in CLASSES]
        self.shapes_of_classes = torch.tensor(shapes)

    def silhouette_loss(self, tokens: Tensor, points: Tensor, own: Tensor, chosen: Tensor) -> Tensor:
        """Cross-entropy of which points of a patch and its eight neighbours are of the patch's class.

        Args:
            tokens: of the patches `[B, N, C]`.
            points: classes `[B, side, side, 4, 4]`.
            own: each patch's class `[B, N]`.
            chosen: the patches' places in the view `[B, N]`.
        """
        plane = points.transpose(2, 3).flatten(3).flatten(1, 2)  # B, 4 * side, 4 * side
        plane = F.pad(plane.float(), (POINTS,) * 4, value=-1)
        around = F.unfold(plane[:, None], 3 * POINTS, stride=POINTS).transpose(1, 2)  # B, side * side, 144
        around = around.gather(1, chosen[..., None].expand(-1, -1, around.shape[2]))
        logits = self.silhouette(tokens).float()
        same = (around == own[..., None]).float()
        loss = F.binary_cross_entropy_with_logits(logits, same, reduction="none")
        return loss[around >= 0].mean()

    def centre_loss(self, tokens: Tensor, own: Tensor, chosen: Tensor, side: int) -> Tensor:
        """Smooth L1 loss of each thing patch's way, in patches, to the middle of the patches of its class."""
        places = torch.stack([chosen // side, chosen % side], dim=2).float()
        same = (own[:, :, None] == own[:, None]).float()
        way = same @ places / same.sum(2, keepdim=True) - places
        things = own >= len(GROUNDS)
        return F.smooth_l1_loss(self.centre(tokens)[things].float(), way[things])

    def shape_loss(self, tokens: list[Tensor], own: Tensor) -> Tensor:
        """Cross-entropy of the shape that each patch `own [B, N]` is of, the grounds left out."""
        target = self.shapes_of_classes[own].flatten()
        losses = [
            F.cross_entropy(head(x).float().flatten(0, 1), target)
            for head, x in zip(self.shapes, tokens, strict=True)
        ]
        return torch.stack(losses).mean()


def run_block(block: Any, x: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A block of CLIP's image tower, with its three projections in one product.

    Args:
        block: the block.
        x: its input `[B, 1 + N, C]`, the class token first.
        own: class indices `[B, N]`, or None.

    Returns:
        The output; and, with `own`, the mean negative logarithm of the attention that the first head pays to
        patches of a patch's own class.
    """
    attention = block.attn
    weight = torch.cat([attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight])
    qkv = F.linear(block.ln_1(x), weight, attention.in_proj_bias)
    q, k, v = qkv.view(*x.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    companions = None
    if own is not None:
        first = scores[:, 0, 1:].float()
        same = own[:, :, None] == own[:, None]
        to_own = first[..., 1:].masked_fill(~same, float("-inf")).logsumexp(2)
        companions = (first.logsumexp(2) - to_own).mean()
    with torch.autocast("cpu", enabled=False):
        weights = scores.softmax(3)
    x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x)), companions


def losses_of(
    clip: DenseCLIP, guide: Guide, batch: tuple[Tensor, Tensor, Tensor], vocabularies: list[Vocabulary]
) -> Tensor:
    """Losses of the vocabularies over half of the things' patches, a tenth of others; and the guides'."""
    patches, all_points, (chosen, places) = batch
    points = all_points.flatten(3).flatten(1, 2)
    points = points.gather(1, chosen[..., None].expand(-1, -1, points.shape[2]))
    own = points.mode(dim=2).values
    visual = clip.visual
    pixels = normalise(patches.view(-1, 3, PATCH, PATCH).float())[0].view(patches.shape)
    positions = clip.position_embedding(GRID, GRID)
    x = F.linear(pixels, visual.conv1.weight.flatten(1)) + positions[1:][places]
    first = (visual.class_embedding + positions[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first.to(x.dtype), x], dim=1))
    *blocks, last = visual.transformer.resblocks
    companions, read = [], []
    for index, block in enumerate(blocks):
        x, loss = run_block(block, x, own if index in COMPANIONS else None)
        if loss is not None:
            companions.append(loss)
        if index == SILHOUETTE:
            silhouette = guide.silhouette_loss(x[:, 1:], all_points, own, chosen)
        if index == CENTRE:
            centre = guide.centre_loss(x[:, 1:], own, chosen, all_points.shape[1])
        if index in READ:
            read.append(x[:, 1:])
    guiding = [silhouette, torch.stack(companions).mean(), centre, guide.shape_loss(read, own)]

    judged = torch.rand(own.shape) < torch.where((points >= len(GROUNDS)).any(2), 0.5, 0.1)
    # The last block attends to nothing, so a patch needs nothing but the class token beside it.
    pairs = torch.stack([x[:, :1].expand_as(x[:, 1:])[judged], x[:, 1:][judged]], dim=1)
    features = (visual.ln_post(clip._value_path(last, pairs)) @ visual.proj)[:, 1].float()
    drawn = [vocabulary.draw() for vocabulary in vocabularies]
    texts = torch.cat(drawn)
    text = clip.encode_text(texts[:, : int(texts.argmax(-1).max()) + 1], normalize=True).float()
    with torch.autocast("cpu", enabled=False):
        logits = clip.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
    points = points[judged]
    naming = [
        -part.log_softmax(1).gather(1, vocabulary.index[points]).mean()
        for part, vocabulary in zip(logits.split([len(ids) for ids in drawn], 1), vocabularies, strict=True)
    ]
    return torch.stack([*naming, *guiding])


def make_optimisers(clip: DenseCLIP, guide: Guide, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the image tower's blocks, AdamW for everything else."""
    matrices = [p for p in clip.visual.transformer.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    rest = [p for p in (*clip.parameters(), *guide.parameters()) if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=MUON * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate_at(step: int, total: int, decay: float) -> float:
    """The learning rate's factor: it rises for 100 steps, stays, and falls to 0 in the last share `decay`."""
    return min(1.0, (step + 1) / 100, (1 - step / total) / decay)


def average(parameters: list[nn.Parameter], *values: float) -> list[float]:
    """Replace gradients by their mean over the processes; the means of some values."""
    if not dist.is_initialized():
        return list(values)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([torch.tensor(values), *(x.flatten() for x in gradients)])
    dist.all_reduce(flat)
    means, *parts = (flat / dist.get_world_size()).split([len(values), *(x.numel() for x in gradients)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return means.tolist()


def train(options: argparse.Namespace) -> None:
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    model = CATSeg(DEMO, clip_finetune="full")
    clip = model.clip_model.requires_grad_(True).train()
    load_into(model, read_checkpoint(options.init), str(options.init))
    guide = Guide()
    optimisers = make_optimisers(clip, guide, options.lr)
    parameters = [*clip.parameters(), *guide.parameters()]
    step, minutes = 0, 0.0
    state_file = options.output.with_suffix(".state.pt")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        clip.load_state_dict(state["clip"])
        guide.load_state_dict(state["guide"])
        for optimiser, its in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        step, minutes = state["step"], state["minutes"]

    def spent() -> float:
        """Minutes of this process's CPU that the run took."""
        return minutes + time.process_time() / 60

    def save() -> None:
        state = {
            "clip": clip.state_dict(), "guide": guide.state_dict(), "step": step, "minutes": spent(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        }  # fmt: skip
        with replacing(state_file) as temporary:
            torch.save(state, temporary)
        with replacing(options.output) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)

    views = Views(options.data, rank, count, options.seed + step)
    torch.manual_seed((options.seed + step) * count + rank)
    vocabularies = [Vocabulary(parts) for parts in PARTS]
    full, shape = vocabularies[0], vocabularies[3]
    others = [vocabulary for vocabulary in vocabularies if vocabulary not in (full, shape)]
    log = options.output.with_suffix(".jsonl").open("a", encoding="utf-8")
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    while step < options.steps:
        if step < options.windows * options.steps:
            batch = views.batch(options.batch_size, WINDOW, SEEN)
        else:
            batch = views.batch(max(1, options.batch_size // 6), GRID, GRID * GRID)
        for optimiser, rate in zip(optimisers, (MUON * options.lr, options.lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * rate_at(step, options.steps, options.decay)
        drawn = others[int(torch.randint(len(others), ()))]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            losses = losses_of(clip, guide, batch, [full, shape, drawn])
        (losses @ torch.tensor(WEIGHTS) / sum(WEIGHTS)).backward()
        (stopped,) = average(parameters, float(bool(stop)))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(100))
        step += 1
        if rank == 0 and (step % 10 == 0 or step == options.steps):
            row = {
                "step": step,
                "cpu_minutes": round(spent(), 2),
                "loss": [round(x, 3) for x in losses.tolist()],
                "scale": round(clip.logit_scale.exp().item(), 2),
            }
            print(json.dumps(row), file=log, flush=True)
        if rank == 0 and (step % 50 == 0 or step == options.steps or stopped):
            save()
        if stopped:
            break
    if count > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="scenes of the split 'train'")
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--init", type=Path, required=True, help="weights of the demo variant to start from")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=32, help="windows per step and process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=float, default=0.85, help="share of the steps with windows")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
