"""Triton kernels of the CAT-Seg aggregator, one op a file."""
