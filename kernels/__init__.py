"""A library of ops: functions of tensors and numbers on Triton kernels, each with a plain form in torch.

It imports only torch, triton and itself. Each op is a folder whose `op.py` declares it; `launch/` is shared.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catseg_fast.kernels.launch.op import Op

# The module and the name of each op's declaration; importing one needs triton.
OPS = {
    "embed_cost_volume": "cost_volume.op:OP",
    "window_block": "window_attention.op:OP",
    "class_collect": "class_attention.op:COLLECT",
    "class_apply": "class_attention.op:APPLY",
    "decode": "decoder.op:OP",
    "update_label_map": "label_map.op:OP",
}

# Ops whose launch configs can be tuned; those of other ops are fixed.
TUNABLE_OPS = tuple(name for name in OPS if name != "update_label_map")


def load(name: str) -> Op:
    """Return an op's declaration."""
    module, attribute = OPS[name].split(":")
    op: Op = getattr(import_module(f"{__name__}.{module}"), attribute)
    return op
