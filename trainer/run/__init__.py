"""One attempt of a run.

In: a configuration, readings, signals.
Out: the run directory: config, journal, console lines, checkpoints.
Never: computes losses or decides what to train on.
"""
