"""The way from a picture to labels: decoding, CLIP features, crops, label maps, results.

May import engine, text, kernels, reference and the ground modules; not the model, output or the commands.
"""
