"""Writing checkpoints, in any format: whole, on the disk, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from catseg_fast.files import replacing


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors or, by the path's suffix, as upstream's `{"model": …}`.

    Args:
        path: the file; what is there is replaced.
        tensors: contiguous, each with a storage of its own, on the CPU.
        metadata: texts to keep beside them.

    Raises:
        OSError: if the file cannot be written, say because the disk is full, with the errno and the path.
    """
    if path.suffix == ".safetensors":
        with replacing(path, durable=True) as temporary:
            safetensors.torch.save_file(dict(tensors), temporary, metadata=dict(metadata))
    else:
        write_torch_file(path, {"model": dict(tensors), "metadata": dict(metadata)})


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with `torch.save` and the checksum of every entry; errors as in `write_weights`."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        # torch's own writer to a path does not report the reason of a failure.
        with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
            torch.save(dict(content), file)
    finally:
        torch.serialization.set_crc32_options(checksums)
