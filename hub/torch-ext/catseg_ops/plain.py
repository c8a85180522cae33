"""Each op in plain PyTorch, in any floating type and on any device: what the kernels are tested against."""

from .class_attention.op import APPLY, COLLECT
from .cost_volume.op import OP as COST_VOLUME
from .decoder.op import OP as DECODER
from .label_map.op import OP as LABEL_MAP
from .window_attention.op import OP as WINDOW

window_block = WINDOW.plain
class_collect = COLLECT.plain
class_apply = APPLY.plain
embed_cost_volume = COST_VOLUME.plain
decode = DECODER.plain
update_label_map = LABEL_MAP.plain

__all__ = ["class_apply", "class_collect", "decode", "embed_cost_volume", "update_label_map", "window_block"]
