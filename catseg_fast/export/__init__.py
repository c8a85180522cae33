"""Export of a model as a graph: `torch.export` and ONNX.

It may import the engine, reference and the ground modules.
"""

from typing import TYPE_CHECKING

from catseg_fast.imports import lazy_attributes

if TYPE_CHECKING:
    from catseg_fast.export.graph import export_onnx, export_program

__all__ = ["export_onnx", "export_program"]

# The command's options need no torch.
__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "graph"))
