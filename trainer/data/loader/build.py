"""The training batches and the validation set of a run, from its configuration. The classes themselves take only the settings they use."""

from __future__ import annotations

import torch

from trainer.config.run_config import Config
from trainer.data.augment.decode_on_device import DeviceDecoder, nvjpeg
from trainer.data.augment.transform import Transform
from trainer.data.loader.batch_maker import BatchMaker
from trainer.data.loader.dataset import check_labels
from trainer.data.loader.decoded_ahead import DecodedAhead
from trainer.data.loader.probed import most_probed
from trainer.data.loader.stream import Stream
from trainer.data.loader.validation import CleanImages, Validation
from trainer.data.shards.index import Index


def batch_maker(index: Index, config: Config, train: bool, *, on_device: bool = False) -> BatchMaker:
    """Makes batches as the run does: `train` with augmentation, else with timm's evaluation transform. on_device: with JPEGs for the
    device."""
    transform = Transform(config.augment, config.model.image_size, train, config.evaluate.crop_pct, on_device=on_device)
    return BatchMaker(index, config.data, transform, config.seed)


def training_stream(index: Index, config: Config, rank: int, world: int) -> Stream:
    """The run's training batches of one rank. Raises DataError for labels outside model.classes, ConfigError as in `Stream`."""
    check_labels(index, config.model.classes)
    least_shown = 1 - config.examples.settings.left_out
    if config.data.decode_on == "workers":
        return Stream(batch_maker(index, config, train=True), config.data, rank, world, least_shown)

    if torch.cuda.is_available():
        nvjpeg()  # a missing library is refused before workers start

    def decoder() -> DeviceDecoder:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return DeviceDecoder(config.model.image_size, config.augment.interpolation, index.where, device)

    maker = batch_maker(index, config, train=True, on_device=True)
    return Stream(maker, config.data, rank, world, least_shown, DecodedAhead(decoder))


def validation_set(index: Index, config: Config, rank: int, world: int) -> Validation:
    """The run's validation batches of one rank. Raises DataError for labels outside model.classes."""
    check_labels(index, config.model.classes)
    padded = config.engine.compile  # a shorter last batch would be a graph of its own
    maker = batch_maker(index, config, train=False)
    return Validation(maker, config.data, config.evaluate.batch, rank, world, padded=padded)


def clean_images(index: Index, config: Config, rank: int, world: int, share: float) -> CleanImages:
    """Training images without augmentation, of which at most `share` (as `probed` chooses them) are asked for at once."""
    most = most_probed(len(index), share)
    return CleanImages(
        batch_maker(index, config, train=False), config.data, min(config.evaluate.batch, -(-most // world)), rank, world
    )
