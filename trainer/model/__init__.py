"""The network and what trains it.

In: sections of the configuration, weights.
Out: network, loss, optimizer, EMA, schedule, one evaluation pass.
Never: writes files of a run or talks to other ranks (the engine does).
"""
