"""What to leave out: examples, tokens, attention connections. Tensors and arrays in, tensors and arrays out.

`types` has the words, `vit` runs a timm VisionTransformer with the seams, `methods` (TOKENS, CONNECTIONS) and `examples` (EXAMPLES)
name the mechanisms, `plans` says what a moment of training keeps, `cost` what that saves. Nothing here knows files, networks or the
trainer, and importing the package imports nothing else: the processes that decode images stay small.
"""
