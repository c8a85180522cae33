"""Class names to prompts: ensembles of templates, synonyms.

Sources: upstream `cat_seg/modeling/transformer/cat_seg_predictor.py` (`class_embeddings` in v1,
`get_text_embeds` in v2) and `cat_seg/third_party/imagenet_templates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip

from catseg_fast.config import Version
from catseg_fast.errors import InputError, InputTypeError

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


def get_templates(prompt_ensemble: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates of a named ensemble, or the given ones after a check.

    Raises:
        InputError: if the name is unknown, there is no template, or one lacks its `{}`.
    """
    if isinstance(prompt_ensemble, str):
        if prompt_ensemble not in PROMPT_ENSEMBLES:
            names = ", ".join(PROMPT_ENSEMBLES)
            raise InputError(f"prompt_ensemble: {prompt_ensemble!r} is not one of {names}")
        return PROMPT_ENSEMBLES[prompt_ensemble]
    templates = tuple(prompt_ensemble)
    for template in templates:
        if "{}" not in template:
            raise InputError(f"prompt_ensemble: the template {template!r} has no {{}} for the class name")
    if not templates:
        raise InputError("prompt_ensemble: there is no template")
    return templates


def check_classes(classes: Sequence[str], name: str = "classes") -> tuple[str, ...]:
    """The class names as a tuple, after checks.

    Raises:
        InputTypeError: if `classes` is one string, or holds something else than strings.
        InputError: if there is no class, a name or one of its synonyms is blank, or a name is listed twice.
    """
    if isinstance(classes, str):
        raise InputTypeError(f"{name}: a list of names is wanted, not the string {classes!r}")
    classes = tuple(classes)
    if not classes:
        raise InputError(f"{name}: the list is empty; at least one class is needed")
    seen: dict[str, int] = {}
    for index, label in enumerate(classes):
        if not isinstance(label, str):
            raise InputTypeError(f"{name}: entry {index} is {label!r}, not a string")
        if not label.strip():
            raise InputError(f"{name}: entry {index} is blank")
        if not all(synonym.strip() for synonym in label.split(SYNONYM_SEPARATOR)):
            raise InputError(f"{name}: entry {index}, {label!r}, has a blank synonym")
        if label in seen:
            raise InputError(f"{name}: {label!r} is listed twice (entries {seen[label]} and {index})")
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
