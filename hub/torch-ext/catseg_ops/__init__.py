"""The ops of CAT-Seg: functions of tensors and numbers on Triton kernels. `plain` has each in PyTorch."""

from . import plain
from .class_attention.op import class_apply, class_collect
from .cost_volume.op import embed_cost_volume
from .decoder.op import decode, pack_weights
from .label_map.op import update_label_map
from .window_attention.op import window_block

__all__ = [
    "class_apply",
    "class_collect",
    "decode",
    "embed_cost_volume",
    "pack_weights",
    "plain",
    "update_label_map",
    "window_block",
]
