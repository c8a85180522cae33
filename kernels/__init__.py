"""A library of ops: functions of tensors and numbers on Triton kernels, each with a plain form in torch.

It imports torch, triton and itself. Each op is a folder, whose `op.py` declares it; `launch/` is shared.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catseg_fast.kernels.launch.op import Op

# The module of each op that declares it as `OP`; importing one needs triton.
OPS = {
    "window_block": "window_attention.op",
}


def load(name: str) -> Op:
    """Return an op's declaration."""
    op: Op = import_module(f"{__name__}.{OPS[name]}").OP
    return op
