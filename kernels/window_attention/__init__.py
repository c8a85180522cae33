"""Guided shifted-window attention: `op.py` and its kernels."""
