"""Makes a validation split of a source that has none: a share of each class's images, chosen by the seed."""

from __future__ import annotations

from collections import defaultdict

from trainer.data.errors import DataError
from trainer.data.keyed_hash import permutation
from trainer.data.shards.source_image import SourceImage

VALIDATION = "validation"


def with_hold_out(splits: dict[str, list[SourceImage]], share: float, seed: int) -> dict[str, list[SourceImage]]:
    """The one split of a source without a share of each class's images, and these as `validation`: of n images n x share, rounded, at
    least one, but never all (of a class with one image none). The same for the same images and seed, in whatever order they are read.

    Raises DataError for a share outside 0 < share < 1 and for a source with a split `validation`, or with several."""
    if not 0 < share < 1:
        raise DataError(
            f"pack --hold-out {share:g}: must be > 0 and < 1: the share of each class's images for validation, e.g. 0.1"
        )
    if len(splits) != 1 or VALIDATION in splits:
        raise DataError(f"pack --hold-out {share:g}: the source has the splits {', '.join(splits)}; leave --hold-out out")
    ((name, images),) = splits.items()
    classes: defaultdict[str, list[SourceImage]] = defaultdict(list)
    for image in sorted(images, key=lambda image: image.key):
        classes[image.label].append(image)
    train, held = [], []
    for number, label in enumerate(sorted(classes)):
        of_class = classes[label]
        count = min(max(round(len(of_class) * share), 1), len(of_class) - 1)
        shuffled = [of_class[place] for place in permutation(len(of_class), seed, number, len(of_class))]
        held += shuffled[:count]
        train += shuffled[count:]
    if not held:
        raise DataError(f"pack --hold-out {share:g}: no class has two images, so none can be held out")
    return {name: train, VALIDATION: held}
