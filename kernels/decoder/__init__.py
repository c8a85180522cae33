"""Guided upsampling decoder: `op.py` and its kernels."""
