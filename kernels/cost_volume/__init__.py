"""Cost volume and 7x7 embedding: `op.py` and its kernels."""
