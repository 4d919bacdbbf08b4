"""Makes a Batch in a worker process: read, decode, crop, fill."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from trainer.config.schema import DataConfig
from trainer.data.augment.decode import BrokenImage, EncodedImage, header
from trainer.data.augment.device_jpeg import FIELDS, DeviceJpeg, row_bytes
from trainer.data.augment.transform import AugmentedImage, Transform
from trainer.data.batch import PADDING, Batch
from trainer.data.errors import DataError
from trainer.data.keyed_hash import row_keys
from trainer.data.loader.dataset import cache_of
from trainer.data.loader.shared_buffers import new_buffer
from trainer.data.order import Rows
from trainer.data.shards.index import Index
from trainer.data.shards.reader import Reader


class BatchMaker:
    """Rows of a global batch, or of a part of it -> Batch. seed: of the run; all random choices about a row follow from it. row_bytes: of a
    row of `images` with JPEGs for the device; 0: pixels alone."""

    def __init__(self, index: Index, data: DataConfig, transform: Transform, seed: int) -> None:
        self.index, self.seed, self.size = index, seed, transform.size
        self._reader, self._transform = Reader(index, cache_of(index, data)), transform
        self.row_bytes = row_bytes(index.length, transform.size) if transform.on_device else 0

    def batch(self, epoch: int, rows: Rows, slots: int, images: Tensor | None = None) -> Batch:
        """images: the buffer for the pixels, see `shared_buffers`; None: a new one."""
        images = new_buffer(slots, self.size, self.row_bytes) if images is None else images
        # (b, S, S, 3), or (b, bytes); numpy writes a row in a tenth of torch's time
        pixels = images.numpy() if self.row_bytes else images.permute(0, 2, 3, 1).numpy()
        weights, flip, erase = np.zeros(slots, np.float32), np.zeros(slots, bool), np.zeros((slots, 4), np.int32)
        jpeg = np.zeros((slots, FIELDS if self.row_bytes else 0), np.int64)
        policy = np.zeros((slots, self._transform.layers, 2))
        keys = row_keys(self.seed, epoch, rows.ids, rows.copies)
        broken: dict[int, str] = {}
        distinct, place = np.unique(rows.ids, return_inverse=True)
        data, copies = self._reader.read(distinct), len(distinct) < len(rows.ids)
        opened: dict[int, EncodedImage | PIL.Image.Image | DeviceJpeg] = {}
        for row, (which, key) in enumerate(zip(place.tolist(), keys.tolist(), strict=True)):
            example, raw = int(distinct[which]), data[which]
            if example in broken:
                continue
            try:
                if isinstance(raw, DataError):
                    raise raw
                if which not in opened:
                    opened[which] = self._transform.decode(raw, copies)
                image = self._augmented(opened[which], key)
            except (BrokenImage, DataError) as error:
                broken[example] = f"{self.index.where(example)}: {error}"
                continue
            except (
                MemoryError,
                RuntimeError,
                ValueError,
            ) as error:  # of a resize or a colour policy: count the image as broken, keep the run alive
                broken[example] = f"{self.index.where(example)}: {type(error).__name__}: {error}"
                continue
            if image.jpeg:
                pixels[row, : len(image.pixels)] = image.pixels.numpy()
                jpeg[row] = len(image.pixels), *image.jpeg
            elif self.row_bytes:
                pixels[row, : image.pixels.numel()] = image.pixels.permute(1, 2, 0).reshape(-1).numpy()
            else:
                pixels[row] = image.pixels.permute(1, 2, 0).numpy()
            weights[row], flip[row], erase[row] = 1.0, image.flip, image.erase
            if image.policy:
                policy[row] = image.policy
            if not copies:
                opened.clear()  # release the decoded image
        pixels[weights == 0] = 0  # padding and broken images are black
        return Batch(
            images,
            _filled(self.index.labels[rows.ids], slots, 0),
            _filled(rows.ids, slots, PADDING),
            _filled(rows.copies, slots, 0),
            torch.from_numpy(weights),
            torch.from_numpy(policy),
            torch.from_numpy(flip),
            torch.from_numpy(erase),
            torch.from_numpy(jpeg),
            _filled(keys, slots, 0),
            sorted(broken.items()),
        )

    def _augmented(self, image: EncodedImage | PIL.Image.Image | DeviceJpeg, key: int) -> AugmentedImage:
        if isinstance(image, DeviceJpeg) and len(image.data) > self.row_bytes:
            image = image.image
        return self._transform.apply(image, key)

    def boxes(self, ids: np.ndarray, keys: np.ndarray) -> list[list[int] | None]:
        """The crop of each row in its source image (see `Transform.box`); None for a broken image, and for crops without a box."""
        found: list[list[int] | None] = []
        for data, key in zip(self._reader.read(ids), keys.tolist(), strict=True):
            try:
                image = None if isinstance(data, DataError) else header(data)
            except BrokenImage:
                image = None
            box = None if image is None else self._transform.box(key, image.height, image.width)
            found.append(None if box is None else list(box))
        return found


def _filled(values: np.ndarray, slots: int, padding: int) -> Tensor:
    filled = torch.full((slots,), padding, dtype=torch.int64)
    filled[: len(values)] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    return filled
