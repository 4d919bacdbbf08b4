"""Shards: tar files, their index, labels, packing.

In: tar files, folders of images, other layouts of data sets.
Out: an index (offset, length, label per example) and the bytes of an example.
Never: decodes pixels, but where `trilevel pack` resizes; orders examples.
"""
