"""Before the GPU-hours are spent.

In: a configuration, hosts, shards.
Out: checks, an estimate of hours and bottleneck, parity with timm.
Never: changes data or runs.
"""
