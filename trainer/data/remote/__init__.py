"""Remote shards: http, S3, gs, hf, pipes, and a bounded cache on the node.

In: URLs.
Out: bytes, or local paths of complete shards.
Never: opens a tar or decodes an image.
"""
