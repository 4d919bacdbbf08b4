"""Training images for calibration: of mass thresholds (`trilevel calibrate`) and of int8 ranges (`trilevel export --int8`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.keyed_hash import permutation
from trainer.data.loader.build import clean_images
from trainer.data.progress import tracked
from trainer.data.shards.index import Index

SALT = 0x63616C6962  # of the draw


def calibration_images(config: Config, index: Index, images: int, device: torch.device, title: str) -> Iterator[Tensor]:
    """Up to `images` of the index, drawn by `config.seed`, under the evaluation transform: normalised, (b, 3, S, S), broken ones left out.

    title: of the progress. Raises DataError, as the loader does.
    """
    ids = np.sort(permutation(len(index), config.seed, SALT)[: min(images, len(index))])
    batches = -(-len(ids) // config.evaluate.batch)
    for batch in tracked(clean_images(index, config, 0, 1, 1.0).of(ids), title, batches, "batches"):
        pixels = normalise(batch.images.to(device), config.augment)
        yield pixels[batch.weights.to(device) > 0]
