"""Class names to prompts: ensembles of templates, synonyms.

Sources: upstream `cat_seg/modeling/transformer/cat_seg_predictor.py` (`class_embeddings` in v1,
`get_text_embeds` in v2) and `cat_seg/third_party/imagenet_templates.py`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from catseg_fast.config import Version
from catseg_fast.errors import InputError, InputTypeError, quoted, shortened

SYNONYM_SEPARATOR = ", "
SCENE_TEMPLATE = "A photo of a {} in the scene"

# Numbers of prompt templates by upstream's PROMPT_ENSEMBLE_TYPE.
PROMPT_ENSEMBLES = {"imagenet": 80, "imagenet_select": 8, "single": 1}
_TEMPLATES = {
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
    """Return the templates of a named ensemble, or the given ones after a check.

    Raises:
        InputTypeError: if a template is not a string, or they have no order.
        InputError: if the name is unknown, there is no template, or one lacks its `{}` or has other braces.
    """
    if isinstance(prompt_ensemble, str):
        if prompt_ensemble not in PROMPT_ENSEMBLES:
            names = ", ".join(PROMPT_ENSEMBLES)
            raise InputError(
                f"prompt_ensemble: {prompt_ensemble!r} is not one of {names}; own templates come in a list"
            )
        return _TEMPLATES.get(prompt_ensemble) or _imagenet_templates()
    templates = _ordered(prompt_ensemble, "prompt_ensemble", "templates")
    for index, template in enumerate(templates):
        if not isinstance(template, str):
            raise InputTypeError(f"prompt_ensemble: entry {index} is {template!r}, not a string")
        _check_template(template)
    if not templates:
        raise InputError("prompt_ensemble: there is no template")
    return templates


def _check_template(template: str) -> None:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(
            f"prompt_ensemble: the template {quoted(template)} has a lone brace: {error}"
        ) from error
    fields = [part for part in parts if part != (None, None, None)]
    if not fields:
        raise InputError(f"prompt_ensemble: the template {quoted(template)} has no {{}} for the class name")
    if any(field != ("", "", None) for field in fields):
        raise InputError(
            f"prompt_ensemble: the template {quoted(template)} has other braces than {{}} for the class "
            "name; {{ and }} stand for braces"
        )


def _ordered(items: Iterable[Any], name: str, kind: str) -> tuple[Any, ...]:
    """Return the items as a tuple.

    Raises:
        InputTypeError: if they are not a sequence, or have no order.
    """
    found = type(items).__name__
    if isinstance(items, AbstractSet) and not isinstance(items, KeysView):
        raise InputTypeError(
            f"{name}: expected a list of {kind}, got a {found}, whose order changes from run to run; "
            "sorted() gives it one"
        )
    if isinstance(items, Mapping):
        raise InputTypeError(
            f"{name}: expected a list of {kind}, got a {found}; pass the list of its keys or values"
        )
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        raise InputTypeError(f"{name}: expected a list of {kind}, got {shortened(items)}")
    return tuple(items)


def _imagenet_templates() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # takes seconds

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def check_classes(classes: Sequence[str], name: str = "classes") -> tuple[str, ...]:
    """Return the class names as a tuple, after checks.

    Raises:
        InputTypeError: if `classes` is one string or a set, or holds anything other than strings.
        InputError: if there is no class, a name or one of its synonyms is blank or not valid Unicode, or a
            name is listed twice.
    """
    if isinstance(classes, str):
        raise InputTypeError(f"{name}: expected a list of names, got the string {quoted(classes)}")
    classes = _ordered(classes, name, "names")
    if not classes:
        raise InputError(f"{name}: the list is empty; at least one class is needed")
    seen: dict[str, int] = {}
    for index, label in enumerate(classes):
        if not isinstance(label, str):
            raise InputTypeError(f"{name}: entry {index} is {shortened(label)}, not a string")
        if not label.strip():
            raise InputError(f"{name}: entry {index} is blank")
        if not all(synonym.strip() for synonym in label.split(SYNONYM_SEPARATOR.strip())):
            raise InputError(f"{name}: entry {index}, {quoted(label)}, has a blank synonym")
        if not label.isascii() and any("\ud800" <= character <= "\udfff" for character in label):
            raise InputError(
                f"{name}: entry {index}, {quoted(label)}, is not valid Unicode; was it read from "
                "other than UTF-8?"
            )
        if label in seen:
            raise InputError(f"{name}: {quoted(label)} is listed twice (entries {seen[label]} and {index})")
        seen[label] = index
    return classes


def synonyms(label: str, version: Version) -> list[str]:
    """Return the names that stand for a class: v1 averages over all synonyms, v2 takes the first.

    Synonyms are separated by a comma and a space; "a,b" is one name.
    """
    names = label.split(SYNONYM_SEPARATOR)
    return names if version == "v1" else names[:1]


def class_prompts(label: str, templates: Sequence[str], version: Version) -> list[str]:
    """Return the prompts of a class, all synonyms of the first template first."""
    return [
        template.format(*[name] * template.count("{}"))
        for template in templates
        for name in synonyms(label, version)
    ]
