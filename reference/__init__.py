"""The whole of CAT-Seg in plain PyTorch: the reference for every faster path."""

from catseg_fast.reference.aggregator import Aggregator, AggregatorLayer, correlation, select_classes
from catseg_fast.reference.class_attention import (
    AttentionLayer,
    ClassTransformerLayer,
    FullAttention,
    LinearAttention,
)
from catseg_fast.reference.upsample import DoubleConv, Up
from catseg_fast.reference.window_attention import (
    SwinTransformerBlock,
    SwinTransformerBlockWrapper,
    WindowAttention,
)

__all__ = [
    "Aggregator",
    "AggregatorLayer",
    "AttentionLayer",
    "ClassTransformerLayer",
    "DoubleConv",
    "FullAttention",
    "LinearAttention",
    "SwinTransformerBlock",
    "SwinTransformerBlockWrapper",
    "Up",
    "WindowAttention",
    "correlation",
    "select_classes",
]
