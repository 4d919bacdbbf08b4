"""What a packed split holds: classes, images per class, examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.shards.index import Index
from trainer.data.shards.one_based import counts_from_one, renumber
from trainer.data.shards.source_image import SourceImage

_EXAMPLES = 5


def summary(split: str, index: Index, images: list[SourceImage], folder: Path) -> list[str]:
    """Lines: images, classes and shards; images per class; some images with their classes, in the order of the shards."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    lines = [
        f"{split}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards in {folder}",
        f"  images per class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}",
    ]
    if counts_from_one(index):
        lines.append(f"  warning: {renumber(index)}")
    elif len(empty := np.flatnonzero(counts == 0)):
        some = "1 class has" if len(empty) == 1 else f"{len(empty)} classes have"
        lines.append(f"  warning: {some} no images here, e.g. {index.classes[empty[0]]!r}")
    first = {index.labels[place]: place for place in reversed(range(len(images)))}  # an image of each class
    spread = [i * (len(images) - 1) // max(_EXAMPLES - 1, 1) for i in range(_EXAMPLES)]
    for place in sorted(list(dict.fromkeys([*first.values(), *spread]))[:_EXAMPLES]):
        lines.append(f"  {images[place].name} -> {index.classes[index.labels[place]]}")
    return lines
