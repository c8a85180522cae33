"""Triton kernels of the CAT-Seg aggregator, one op a file."""

# Ops whose launch configs can be tuned, by the module that declares `tunables`.
TUNABLE_OPS = {
    "embed_cost_volume": "cost_volume.op",
    "window_block": "window_attention.op",
    "class_collect": "class_attention.op",
    "class_apply": "class_attention.op",
    "decode": "decoder.op",
}
