"""Loading: batches for one rank, decoded by worker processes.

In: an index, an epoch's order, the rank and the number of ranks.
Out: batches in order, the same for any number of ranks and workers.
Never: decides the order.
"""
