"""Files that survive a crash, and what else a process needs of files, streams and memory.

In: bytes and tensors to write, paths to read, texts from data.
Out: files that are complete or absent, never behind another user's link; standard streams that do not end a run; texts that are safe
to show; a limit on memory; where the source tree lies.
Never: knows what the bytes mean.
"""
