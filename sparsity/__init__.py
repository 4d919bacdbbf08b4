"""What to leave out: examples, tokens, attention connections, weights.

In: tensors, arrays and settings.
Out: the network with its mechanisms, the examples of an epoch, their cost.
Never: files, networks, processes, accelerate, the trainer.
"""
