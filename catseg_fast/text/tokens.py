"""Conversion of prompts to CLIP's token ids.

Cleaning a text (ftfy, HTML entities) takes most of a tokenizer's time. Of plain ASCII without "&" it changes
only case and white space, and no token spans white space. So the tokens of a plain text are those of its
words, one after the other. A class list has few different words, and each is tokenised once. open_clip's
tokenizer takes other texts as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from catseg_fast.config import Version
from catseg_fast.errors import InputError, quoted
from catseg_fast.text.prompts import class_prompts

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

KEPT_WORDS = 2**16
LONGEST_TOKEN = 32  # bytes


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """Return CLIP token ids `[len(texts), context_length]`, zero after the end of the text.

    Raises:
        InputError: if a text has more tokens than `context_length` (CLIP would silently truncate it).
    """
    tokenizer = _tokenizer()
    tokens = np.zeros((len(texts), context_length), dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        # The tokenizer's time grows with the square of a word's length.
        least = -(-len("".join(text.split()).encode()) // LONGEST_TOKEN)
        if least > 2 * context_length:  # cleaning may shorten it
            raise InputError(
                f"the text {quoted(text)} has at least {least} tokens, more than CLIP's {context_length}"
            )
        ids = [tokenizer.sot_token_id, *_encode(text), tokenizer.eot_token_id]
        if len(ids) > context_length:
            raise InputError(
                f"the text {quoted(text)} has {len(ids)} tokens, more than CLIP's {context_length}"
            )
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


def tokenize_classes(
    classes: Sequence[str], templates: Sequence[str], version: Version, context_length: int = 77
) -> list[Tensor]:
    """Return the token ids of each class's prompts, `[P * synonyms, context_length]` each.

    Raises:
        InputError: if a prompt is too long; the error names the class.
    """
    tokens = []
    for label in classes:
        try:
            tokens.append(tokenize(class_prompts(label, templates, version), context_length))
        except ValueError as error:
            raise InputError(f"classes: {quoted(label)} does not fit: {error}") from error
    return tokens


def _encode(text: str) -> list[int]:
    if text.isascii() and text.isprintable() and "&" not in text:
        return [token for word in text.lower().split() for token in _encode_word(word)]
    return _tokenizer().encode(text)


@lru_cache(KEPT_WORDS)
def _encode_word(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


@cache
def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds

    return SimpleTokenizer()
