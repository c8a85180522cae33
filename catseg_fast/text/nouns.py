"""About eleven thousand nouns for things that can be seen: WordNet's, as timm lists them for ImageNet-12k."""

from __future__ import annotations

from typing import Any


def nouns() -> dict[str, Any]:
    """Return the fields of a `ReadyList`; the names are read from the installed timm.

    A class's name is its synset's first lemma that no class before it has: CLIP cannot tell a bird's "crane"
    from a machine's. If all are taken, the synset is left out.
    """
    from timm.data import ImageNetInfo  # takes seconds

    names: dict[str, str] = {}
    for lemmas in ImageNetInfo("imagenet-12k").label_descriptions():
        free = (lemma for lemma in lemmas.split(", ") if lemma.strip() and lemma.lower() not in names)
        if (name := next(free, None)) is not None:
            names[name.lower()] = name  # CLIP's tokens are of lower-case text
    return {
        "title": f"ImageNet-12k ({len(names)} nouns)",
        "about": "the nouns of the 11,821 WordNet synsets that ImageNet has enough pictures of, as timm "
        "selects them; a name that two synsets share is listed once",
        "source": "https://github.com/huggingface/pytorch-image-models/tree/main/timm/data/_info",
        "licence": "Apache-2.0 (timm); WordNet 3.0 licence, © 2006 Princeton University",
        "note": "The names come with timm, and are read from the installed package.",
        "classes": list(names.values()),
    }
