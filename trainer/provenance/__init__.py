"""Which examples a run used.

In: a run directory and its data.
Out: the hash chain, kept lists, a rebuilt global batch, an audit.
Never: trains.
"""
