"""Class names, and a count of the texts that are encoded."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from catseg_fast.reference.clip import DenseCLIP

NAMES = (*(f"thing number {index}" for index in range(38)), "building, edifice", "sky")


def count_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Append the number of texts of each call of a text tower to the list that is returned."""
    counts: list[int] = []
    encode_text = DenseCLIP.encode_text

    def counted(clip: DenseCLIP, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counts.append(len(text))
        return encode_text(clip, text, *args, **kwargs)

    monkeypatch.setattr(DenseCLIP, "encode_text", counted)
    return counts
