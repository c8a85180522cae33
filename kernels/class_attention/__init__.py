"""Linear attention over the classes: `op.py` and its kernels."""
