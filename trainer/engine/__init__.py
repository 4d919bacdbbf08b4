"""The only importer of accelerate and DeepSpeed.

In: a model, an optimizer, micro-batches.
Out: losses, steps, collectives, full (unsharded) state.
Never: knows what is trained or why.
"""
