"""What a run left out, drawn: tokens of an image, weights of a layer, examples forgotten most and least.

In: a run directory and images.
Out: PNG files.
Never: changes a run.
"""
