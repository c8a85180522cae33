"""Weights: files and hubs, readers that run no code, recognition of variants. demo.safetensors is bundled.

It may import text and the ground modules; nothing here computes.
"""
