"""Data: which examples, in which order, from where, as which pixels.

In: shard patterns, a seed, the kept examples, the position in the run.
Out: batches of images, labels, ids and weights for one rank.
Never: decides which examples are dropped (that is `sparsity.examples`), or knows the network.
"""
