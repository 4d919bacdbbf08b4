"""Files that survive a crash.

In: bytes and tensors to write, paths to read.
Out: files that are complete or absent, and where the source tree lies.
Never: knows what the bytes mean.
"""
