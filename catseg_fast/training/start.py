"""What a run starts from: a whole checkpoint, or CLIP alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from catseg_fast.checkpoint import load_into
from catseg_fast.model import CATSeg
from catseg_fast.recognise import CLIP


def load_start(model: CATSeg, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy a checkpoint into a model: of all of it, or of its CLIP alone; names and shapes must agree.

    Raises:
        ValueError: if they do not; the model is as before.
    """
    inside = {key.removeprefix(CLIP): value for key, value in state_dict.items() if key.startswith(CLIP)}
    if len(inside) == len(state_dict) and inside:
        load_into(model.clip_model, inside, source)
    else:
        load_into(model, state_dict, source)
