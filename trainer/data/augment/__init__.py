"""Pixels: decode, crop, RandAugment, mixup.

In: encoded images, random keys of (seed, epoch, example).
Out: uint8 crops on the host, normalised batches on the device.
Never: uses global random state.
"""
