"""Weights: files and hubs, readers that run no code, recognition of variants. demo.safetensors is bundled.

May import text and the ground modules; nothing here computes.
"""
