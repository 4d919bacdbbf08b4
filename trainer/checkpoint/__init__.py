"""Checkpoints.

In: full state, gathered by the engine.
Out: crash-safe directories; the newest valid one to resume from; exported weights.
Never: runs pickled code.
"""
