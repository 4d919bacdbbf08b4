"""Shards: tar files, their index, labels, packing.

In: tar files, folders of images.
Out: an index (offset, length, label per example) and the bytes of an example.
Never: decodes pixels or orders examples.
"""
