"""Before the GPU-hours are spent.

In: a configuration, hosts, shards.
Out: checks, an estimate of hours and bottleneck, simulated faults, parity with timm, new configurations (`trilevel init`).
Never: changes data, runs or existing configurations.
"""
