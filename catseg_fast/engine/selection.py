"""Selection of a crop's classes if there are more than `max_classes` (upstream v2's `pad_len`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catseg_fast.engine.terms import VocabularyTerms, chunk_text

SCORE_BYTES = 2**27  # size of the cosines that exist at a time


def class_scores(img_feats: Tensor, vocabulary: VocabularyTerms) -> Tensor:
    """Return the scores `[B, T]` of `catseg_fast.reference.select_classes`, without the whole cost volume.

    They are in fp32 at least, since the choice of the best classes is not continuous.

    Args:
        img_feats: image features `[B, F, H, W]`.
        vocabulary: terms of T classes, from `catseg_fast.engine.engine.Engine.vocabulary`.
    """
    precise = torch.promote_types(img_feats.dtype, torch.float32)
    features = F.normalize(img_feats.to(precise), dim=1).flatten(2)
    crops, _, positions = features.shape
    prompts = vocabulary.features.shape[2]
    chunk = max(1, SCORE_BYTES // (crops * prompts * positions * features.itemsize))
    scores = [features.new_empty(crops, 0)]
    for start in range(0, vocabulary.classes, chunk):
        part = slice(start, start + chunk)
        text = chunk_text(vocabulary.features[:, part], vocabulary.inverse_norm[:, part], precise)
        cosines = text.flatten(1, 2) @ features  # B, t*P, HW
        scores.append(cosines.amax(dim=-1).unflatten(1, (-1, text.shape[2])).amax(dim=-1))
    return torch.cat(scores, dim=1)


def best_classes(scores: Tensor, count: int) -> Tensor:
    """Return the ascending indices `[B, count]` of each crop's best classes by `scores [B, T]`."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values
