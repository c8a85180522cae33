"""Label maps from logits, chunk by chunk: `op.py` and its kernels."""
