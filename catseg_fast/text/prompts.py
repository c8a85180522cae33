"""Class names to CLIP text features: prompt ensembles, synonyms, tokens.

Sources: upstream `cat_seg/modeling/transformer/cat_seg_predictor.py` (`class_embeddings` in v1,
`get_text_embeds` in v2) and `cat_seg/third_party/imagenet_templates.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from catseg_fast.config import Version
from catseg_fast.errors import InputTypeError

if TYPE_CHECKING:
    from catseg_fast.reference.clip import DenseCLIP

SYNONYM_SEPARATOR = ", "
SCENE_TEMPLATE = "A photo of a {} in the scene"

# Prompt templates by upstream's PROMPT_ENSEMBLE_TYPE.
PROMPT_ENSEMBLES: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "imagenet_select": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        SCENE_TEMPLATE,
    ),
    "single": (SCENE_TEMPLATE,),
}

Progress = Callable[[int, int], None]


def get_templates(prompt_ensemble: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates of a named ensemble, or the given ones after a check.

    Raises:
        ValueError: if the name is unknown, there is no template, or one lacks its `{}`.
    """
    if isinstance(prompt_ensemble, str):
        if prompt_ensemble not in PROMPT_ENSEMBLES:
            names = ", ".join(PROMPT_ENSEMBLES)
            raise ValueError(f"prompt_ensemble: {prompt_ensemble!r} is not one of {names}")
        return PROMPT_ENSEMBLES[prompt_ensemble]
    templates = tuple(prompt_ensemble)
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"prompt_ensemble: the template {template!r} has no {{}} for the class name")
    if not templates:
        raise ValueError("prompt_ensemble: there is no template")
    return templates


def check_classes(classes: Sequence[str], name: str = "classes") -> tuple[str, ...]:
    """The class names as a tuple, after checks.

    Raises:
        TypeError: if `classes` is one string, or holds something else than strings.
        ValueError: if there is no class, a name or one of its synonyms is blank, or a name stands twice.
    """
    if isinstance(classes, str):
        raise InputTypeError(f"{name}: a list of names is wanted, not the string {classes!r}")
    classes = tuple(classes)
    if not classes:
        raise ValueError(f"{name}: the list is empty; at least one class is needed")
    seen: dict[str, int] = {}
    for index, label in enumerate(classes):
        if not isinstance(label, str):
            raise InputTypeError(f"{name}: entry {index} is {label!r}, not a string")
        if not label.strip():
            raise ValueError(f"{name}: entry {index} is blank")
        if not all(synonym.strip() for synonym in label.split(SYNONYM_SEPARATOR)):
            raise ValueError(f"{name}: entry {index}, {label!r}, has a blank synonym")
        if label in seen:
            raise ValueError(f"{name}: {label!r} stands twice (entries {seen[label]} and {index})")
        seen[label] = index
    return classes


def synonyms(label: str, version: Version) -> list[str]:
    """The names that stand for a class: v1 averages over all synonyms, v2 takes the first.

    Synonyms are separated by a comma and a space; "a,b" is one name.
    """
    names = label.split(SYNONYM_SEPARATOR)
    return names if version == "v1" else names[:1]


def class_prompts(label: str, templates: Sequence[str], version: Version) -> list[str]:
    """Prompts of a class, all synonyms of the first template first."""
    return [template.format(name) for template in templates for name in synonyms(label, version)]


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """CLIP token ids `[len(texts), context_length]`, zero after the end of the text.

    Raises:
        ValueError: if a text has more tokens than `context_length` (CLIP would silently truncate it).
    """
    tokenizer = _tokenizer()
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long, device="cpu")
    for row, text in zip(tokens, texts, strict=True):
        ids = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
        if len(ids) > context_length:
            raise ValueError(f"the text {text!r} has {len(ids)} tokens, more than CLIP's {context_length}")
        row[: len(ids)] = torch.tensor(ids, device="cpu")
    return tokens


def tokenize_classes(
    classes: Sequence[str], templates: Sequence[str], version: Version, context_length: int = 77
) -> list[Tensor]:
    """Token ids of each class's prompts, `[P * synonyms, context_length]` each.

    Raises:
        ValueError: if a prompt is too long; the error names the class.
    """
    tokens = []
    for label in classes:
        try:
            tokens.append(tokenize(class_prompts(label, templates, version), context_length))
        except ValueError as error:
            raise ValueError(f"classes: {label!r} does not fit: {error}") from error
    return tokens


def encode_classes(
    clip: DenseCLIP,
    tokens: Sequence[Tensor],
    prompts: int,
    *,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Text features `[T, P, C]`: unit vectors, the normalised mean over the synonyms of a class.

    Args:
        clip: the text tower; its device and type are used.
        tokens: token ids of each class's prompts, from `tokenize_classes`.
        prompts: templates P a class.
        batch_size: texts in one call of the text tower.
        progress: called with the number of texts done and the number of all.
    """
    if not tokens:
        return clip.text_projection.new_empty(0, prompts, clip.text_projection.shape[1])
    flat = torch.cat(list(tokens))
    encoded = []
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        used = int(batch.argmax(dim=-1).max()) + 1  # the end-of-text token has the largest id
        features = clip.encode_text(batch[:, :used].to(clip.positional_embedding.device))
        encoded.append(F.normalize(features, dim=-1))
        if progress is not None:
            progress(min(start + batch_size, len(flat)), len(flat))
    by_class = torch.cat(encoded).split([len(ids) for ids in tokens])
    return torch.stack([_mean_over_synonyms(features, prompts) for features in by_class])


def _mean_over_synonyms(features: Tensor, prompts: int) -> Tensor:
    if len(features) == prompts:
        return features
    return F.normalize(features.unflatten(0, (prompts, -1)).mean(dim=1), dim=-1)


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()
