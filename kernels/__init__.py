"""Triton kernels of the CAT-Seg aggregator, one op a file."""

# Ops whose launch configs can be tuned, by the module that declares `tunables`.
TUNABLE_OPS = {
    "embed_cost_volume": "cost_volume",
    "window_block": "window_attention",
    "class_collect": "class_attention",
    "class_apply": "class_attention",
    "decode": "decoder",
}
