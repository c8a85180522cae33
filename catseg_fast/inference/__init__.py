"""From a picture to labels: decoding, CLIP features, crops, label maps, the result that users hold.

May import engine, text, kernels, reference and the ground modules; not the model, output or the commands.
"""
