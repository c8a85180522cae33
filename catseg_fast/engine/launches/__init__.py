"""Launches of kernels that are prepared once and repeated, past the dispatch of Triton and PyTorch.

It imports only `catseg_fast.kernels`.
"""
