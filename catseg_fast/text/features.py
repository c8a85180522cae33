"""Text features of tokens: CLIP's text tower, and the cache of its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.weights import WeightsState, weights_hash

if TYPE_CHECKING:
    from catseg_fast.reference.clip import DenseCLIP
    from catseg_fast.text.features_cache import FeaturesCache

Progress = Callable[[int, int], None]

FORMAT = 1  # version of cached features; changes with the results of `encode_classes`
TEXTS_PER_FILE = 4096  # texts between two writes, the most that an interruption loses

# Below this number of texts, encoding takes less time than hashing the text tower's weights.
WORTH_CACHING = {"cpu": 32, "cuda": 8192}
BATCH_SIZES = {"cpu": 256, "cuda": 1024}


def encode_classes(
    clip: DenseCLIP,
    tokens: Sequence[Tensor],
    prompts: int,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return text features `[T, P, C]`: unit vectors, the normalised means over the synonyms of a class.

    Args:
        clip: the text tower; the features have its device and type.
        tokens: token ids of each class's prompts, from `tokenize_classes`.
        prompts: templates P per class.
        batch_size: texts per call of the text tower; by default, what suits the device.
        dtype: type of the text tower's matrix products (`torch.autocast`); by default the weights'.
        progress: called with the number of texts done and the number of all.
    """
    weight = clip.text_projection
    if not tokens:
        return weight.new_empty(0, prompts, weight.shape[1])
    device = weight.device
    if batch_size is None:
        batch_size = BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"])
    flat = torch.cat(list(tokens))
    lengths = flat.argmax(dim=-1) + 1  # the end-of-text token has the largest id
    order = lengths.argsort(stable=True)  # so that few tokens of a batch come after the end of their text
    encoded = []
    for rows in order.split(batch_size):
        batch = flat[rows, : int(lengths[rows].max())].to(device)
        reduced = dtype is not None and dtype != weight.dtype
        with torch.autocast(device.type, dtype) if reduced else nullcontext():  # else the caller's autocast
            features = clip.encode_text(batch)
        encoded.append(F.normalize(features.to(weight.dtype), dim=-1))
        if progress is not None:
            progress(min(len(encoded) * batch_size, len(flat)), len(flat))
    by_text = torch.cat(encoded)[order.argsort().to(device)]
    by_class = by_text.split([len(ids) for ids in tokens])
    return torch.stack([_mean_over_synonyms(features, prompts) for features in by_class])


def _mean_over_synonyms(features: Tensor, prompts: int) -> Tensor:
    if len(features) == prompts:
        return features
    return F.normalize(features.unflatten(0, (prompts, -1)).mean(dim=1), dim=-1)


class TextEncoder:
    """Encodes classes with a text tower, except those whose features are in a cache.

    Args:
        cache: cache of features; None for no cache.
    """

    def __init__(self, cache: FeaturesCache | None) -> None:
        self.cache = cache
        self._hashed: tuple[object, str] | None = None  # state of the weights, and their hash

    def encode(
        self,
        clip: DenseCLIP,
        tokens: Sequence[Tensor],
        prompts: int,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Tensor:
        """Encode as `encode_classes` does, again in the weights' type if a 16-bit `dtype` overflows.

        Classes with equal tokens are encoded once. Features of a cache equal those that would be computed,
        except for rounding: that depends on what else is in a batch.
        """
        if not tokens:
            return encode_classes(clip, tokens, prompts)
        cache = self.cache if self._worth_caching(clip, tokens) else None
        names = [_digest(ids) for ids in tokens]
        key = "" if cache is None else self._key(clip, prompts, dtype)
        found = {} if cache is None else cache.load(key, set(names))
        missing = {name: ids for name, ids in zip(names, tokens, strict=True) if name not in found}
        total, done = sum(map(len, missing.values())), 0
        for group in _groups(missing, None if cache is None else TEXTS_PER_FILE):
            texts = [missing[name] for name in group]

            def report(texts_done: int, _: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + texts_done, total)

            features = encode_classes(clip, texts, prompts, dtype=dtype, progress=report)
            finite = bool(features.isfinite().all())
            if not finite and dtype != features.dtype:
                features = encode_classes(clip, texts, prompts)
                finite = bool(features.isfinite().all())
            done += sum(map(len, texts))
            entries = dict(zip(group, features if cache is None else features.cpu(), strict=True))
            if cache is not None and finite:
                cache.store(key, entries)
            found |= entries
        return torch.stack([found[name] for name in names]).to(clip.text_projection.device)

    def _worth_caching(self, clip: DenseCLIP, tokens: Sequence[Tensor]) -> bool:
        device = clip.text_projection.device.type
        if device == "meta":
            return False
        if self._hashed is not None and self._hashed[0] == WeightsState(clip.text_parameters()):
            return True
        return sum(map(len, tokens)) >= WORTH_CACHING.get(device, WORTH_CACHING["cuda"])

    def _key(self, clip: DenseCLIP, prompts: int, dtype: torch.dtype) -> str:
        """Return a hash of everything that determines a class's features, except its tokens."""
        parameters = clip.text_parameters()
        state = WeightsState(parameters)
        if self._hashed is None or self._hashed[0] != state:
            named = {f"{index:04}": parameter for index, parameter in enumerate(parameters)}
            self._hashed = (state, weights_hash(named))
        facts = (FORMAT, self._hashed[1], repr(clip.config), clip.version, prompts, str(dtype))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _digest(ids: Tensor) -> str:
    """Return a hash of a class's tokens, that is of its prompts as the text tower sees them."""
    used = int((ids != 0).sum(dim=1).max())
    values = ids[:, :used].to(torch.int32).contiguous().numpy()
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()[:32]


def _groups(tokens: dict[str, Tensor], texts: int | None) -> list[list[str]]:
    """Return the names in groups of about `texts` texts, with at least one class; None for a single group."""
    groups: list[list[str]] = []
    count = 0
    for name, ids in tokens.items():
        if not groups or (texts is not None and count + len(ids) > texts):
            groups.append([])
            count = 0
        groups[-1].append(name)
        count += len(ids)
    return groups
