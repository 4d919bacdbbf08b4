"""Speed and correctness on a GPU: `make gpu PART=...` on a machine with one, predictions and compiled device code without.

In: the networks and steps of a run.
Out: comparisons with the CPU; kernels, bytes and products of a step as inductor would run it on an H200.
Never: changes the device's settings; needs the network.
"""
