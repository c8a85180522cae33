"""The segmentation of one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.inference.images import ImageLike, load_bytes
from catseg_fast.inference.readout import LabelMap, Readout, TopClasses
from catseg_fast.inference.sources import is_url
from catseg_fast.inference.transfer import to_host
from catseg_fast.labels import NONE, check_min_score
from catseg_fast.numeric import whole
from catseg_fast.output.strips import row_strips
from catseg_fast.text.fold import Fold

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture.

    Attributes:
        labels: index into `classes` of each pixel's best class, int32 `[H, W]`, on the CPU; -1 where that
            class's probability is below `min_score`.
        scores: the best class's probability, float32 `[H, W]`, on the CPU, for any `min_score`.
        classes: the class names; of a fold, those of its classes.
        top_labels, top_scores: the best k classes and their probabilities, best first, `[k, H, W]`, where
            they were asked for.
        logits: the crops' logits `[B, T, h, w]` on the CPU, where they were asked for: `score_map` reads
            them.
        readout: how the crops make up the picture, with `logits`.
        image: the picture as it was given, not a copy, or its pixels where it was a stream or a URL:
            `overlay` and `save` read it. None where the answer is not of `segment` or `segment_batch`.
        fold: the classes' names, where a class has several.
        min_score: the probability below which a pixel, or an entry of `top_labels`, has the label -1.
    """

    labels: Tensor
    scores: Tensor
    classes: tuple[str, ...]
    top_labels: Tensor | None = None
    top_scores: Tensor | None = None
    logits: Tensor | None = None
    readout: Readout | None = None
    image: ImageLike | None = field(default=None, repr=False, compare=False)
    fold: Fold | None = None
    min_score: float | None = None

    @classmethod
    def of(
        cls,
        target: LabelMap | TopClasses,
        names: tuple[str, ...],
        readout: Readout,
        logits: Tensor | None = None,
        image: ImageLike | None = None,
        fold: Fold | None = None,
    ) -> Segmentation:
        """The answer that was read out into a target.

        Args:
            target: a label map of names, or the best classes.
            names: what the model has told apart.
            readout: how the crops make up the picture.
            logits: of the names.
            image: the picture, as of `kept_image`.
            fold: of the names into classes.
        """
        labels, scores = to_host(target.labels, target.scores)
        kept, classes = None if logits is None else readout, names if fold is None else fold.classes
        if isinstance(target, TopClasses):
            return cls(labels[0], scores[0], classes, labels, scores, logits, kept, image, fold)
        if fold is not None:
            labels = torch.tensor(fold.owners, dtype=torch.int32)[labels]
        return cls(labels, scores, classes, logits=logits, readout=kept, image=image, fold=fold)

    def with_min_score(self, min_score: float | None) -> Segmentation:
        """Return the same with the label -1 where the probability is below `min_score`; itself for None.

        Raises:
            InputError: if it is not in 0..1, or below the one by which labels were dropped before.
        """
        if min_score is None:
            return self
        top = self.top_labels
        if top is None:
            return replace(self, labels=self.labels.clone()).drop_below(min_score)
        return replace(self, labels=self.labels.clone(), top_labels=top.clone()).drop_below(min_score)

    def drop_below(self, min_score: float | None) -> Segmentation:
        """Do as `with_min_score` in the labels themselves, of an answer that is not used any more."""
        if min_score is None:
            return self
        min_score = check_min_score(min_score)
        if min_score < (self.min_score or 0):
            raise InputError(
                f"min_score: {min_score} is below {self.min_score}, by which labels were dropped before; "
                "segment with the lowest one first"
            )
        maps = [(self.labels, self.scores)]
        if self.top_labels is not None and self.top_scores is not None:
            maps += zip(self.top_labels, self.top_scores, strict=True)
        for labels, scores in maps:
            for rows in row_strips(*labels.shape):
                labels[rows].masked_fill_(scores[rows] < min_score, NONE)
        return replace(self, min_score=min_score)

    def score_map(self, label: int | str) -> Tensor:
        """The probability of one class, by index or name, at each pixel: float32 `[H, W]`.

        Of a class with several names, it is the largest of theirs.

        Raises:
            InputError: if there is no such class, or the logits were not kept.
        """
        if self.logits is None or self.readout is None:
            raise InputError("score_map: the logits were not kept; segment with keep_logits=True")
        index = self._index(label)
        names = slice(index, index + 1) if self.fold is None else self.fold.names_of(index)
        return self.readout(self.logits[:, names]).amax(dim=0)

    def mask(self, label: int | str) -> Tensor:
        """The pixels of one class, by index or name: bool `[H, W]`.

        Raises:
            InputError: if there is no such class.
        """
        return self.labels == self._index(label)

    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, by name, the largest first.

        The rest of 1 has no class: see `min_score`.
        """
        from catseg_fast.output.overlay import class_shares

        shares = enumerate(class_shares(self.labels, len(self.classes)).tolist())
        largest = sorted(((share, -index) for index, share in shares if share), reverse=True)
        return {self.classes[-index]: share for share, index in largest}

    def overlay(
        self, image: ImageLike | None = None, *, alpha: float = 0.55, legend: bool = True
    ) -> Image.Image:
        """Return the picture with the classes' colours over it, and a legend.

        Args:
            image: the picture; by default the one that was segmented, which a path is read again for.
            alpha: share of the colours, 0 to 1.
            legend: whether the largest classes are listed beside it.

        Raises:
            FileNotFoundError, TypeError, ValueError: if there is no picture, it cannot be read, or it has
                another size; or if `alpha` is not in 0..1.
        """
        from catseg_fast.output.overlay import overlay

        return overlay(self._pixels(image), self.labels, self.classes, alpha, legend)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        stem: str | None = None,
        formats: Sequence[str] = (),
        alpha: float = 0.55,
        image: ImageLike | None = None,
    ) -> list[Path]:
        """Write what `catseg-fast segment` writes: overlay, label map and JSON file; return their paths.

        The best classes per pixel, where there are several, go to a file of their own.

        Only results of the same picture are replaced, and files of others never.

        Args:
            folder: where to; it is made if need be.
            stem: how the files' names start; by default as the picture's file, or "segmentation".
            formats: what else to write, of `catseg_fast.output.formats.FORMATS`.
            alpha: share of the colours in the overlay.
            image: as of `overlay`.

        Raises:
            FileNotFoundError, TypeError, ValueError: as in `overlay`; or if there is no such format.
            FileExistsError: if a file is there that is not a result of this picture.
            ImportError: if a format needs a package that is not installed.
        """
        from catseg_fast.identity import content_digest
        from catseg_fast.output.results import result_paths, save_segmentation

        source = self.image if image is None else image
        path = file_of(source)
        digest = None if path is None else content_digest(path)  # first: it may change while it is read
        stem = stem or ("segmentation" if path is None else path.stem)
        about = {"image": None if path is None else str(path)}
        save_segmentation(
            Path(folder), stem, self._pixels(source), self, about, alpha,
            picture=path, digest=digest, formats=formats,
        )  # fmt: skip
        return result_paths(Path(folder), stem, formats, self.top_labels is not None)

    def _pixels(self, image: ImageLike | None) -> Tensor:
        source = self.image if image is None else image
        if source is None:
            raise InputError("image: this answer does not know its picture; pass image=")
        pixels = load_bytes(source, max_pixels=None).cpu()
        if pixels.shape[1:] != self.labels.shape:
            expected = "x".join(map(str, reversed(self.labels.shape)))
            raise InputError(
                f"image: expected the picture of {expected} pixels that was segmented, "
                f"got {pixels.shape[2]}x{pixels.shape[1]}"
            )
        return pixels

    def _index(self, label: int | str) -> int:
        if isinstance(label, str):
            if label not in self.classes:
                raise InputError(f"label: {label!r} is not one of the {len(self.classes)} classes")
            return self.classes.index(label)
        try:
            label = whole(label, "label", None)
        except InputTypeError:
            raise InputTypeError(
                f"label: expected a class's index or name, got {type(label).__name__}"
            ) from None
        if not 0 <= label < len(self.classes):
            raise InputError(f"label: {label} is not in 0..{len(self.classes) - 1}")
        return label


def file_of(image: ImageLike | None) -> Path | None:
    """The path of a picture that was given as one."""
    if isinstance(image, os.PathLike) or (isinstance(image, str) and not is_url(image)):
        return Path(image)
    return None


def kept_image(image: ImageLike, pixels: Tensor) -> ImageLike:
    """Return the picture that a `Segmentation` keeps: `image` itself, if it can be read again."""
    again = isinstance(image, os.PathLike | bytes | bytearray | memoryview) or not hasattr(image, "read")
    if isinstance(image, str):
        again = not is_url(image)
    if again:
        return image
    return (pixels if pixels.dtype == torch.uint8 else pixels.round().byte()).cpu()  # files hold 8 bits
