"""`trilevel verify`: decode every example of a set of shards and list the broken ones."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np

from trainer.data.augment.decode import decode_exact, refuse_long
from trainer.data.errors import DataError
from trainer.data.progress import progress_bar
from trainer.data.remote.cache import Cache
from trainer.data.remote.url import scheme
from trainer.data.shards.index import open_index
from trainer.data.shards.reader import Reader

_CHUNK = 256  # examples read and decoded together
_SHORT_SIDE = 256  # pixels, that evaluation at 224 resizes to: an image is too long for it, or for none


class Broken(NamedTuple):
    """An example that can't be decoded. id: as in the index; where: shard and key; reason: error text."""

    id: int
    where: str
    reason: str


def verify(
    pattern: str,
    labels: str = "cls",
    *,
    workers: int = 4,
    progress: bool = True,
    folder: str | None = None,
    cache: Cache | None = None,
) -> list[Broken]:
    """Every example that can't be read or decoded, by id. Raises DataError if shards and index don't match.

    pattern, labels: of the shards, as in `data.train` and `data.labels`.
    workers: decoding threads; the decoder releases the GIL.
    progress: show a progress bar.
    folder, cache: see `build_index`.
    All bytes are compared with the index's hashes: of local shards first, of remote ones when they enter the cache. Images are
    decoded whole, as in evaluation.
    """
    index = open_index(pattern, labels, "fast" if scheme(pattern) else "full", folder=folder)
    chunks = [np.arange(at, min(at + _CHUNK, len(index))) for at in range(0, len(index), _CHUNK)]

    def broken(ids: np.ndarray) -> list[Broken]:
        found = []
        for example, data in zip(ids.tolist(), Reader(index, cache).read(ids), strict=True):
            try:
                if isinstance(data, DataError):
                    raise data
                image = decode_exact(data)
                refuse_long(image.width, image.height, _SHORT_SIDE)
            except ValueError as error:
                found.append(Broken(example, index.where(example), str(error)))
        return found

    result: list[Broken] = []
    # daemon threads: Ctrl-C ends the command even while a server or a disk blocks one
    with ThreadPool(max(workers, 1)) as pool, progress_bar("verify", len(index), "images", progress) as shown:
        for ids, found in zip(chunks, pool.imap(broken, chunks), strict=True):
            result += found
            shown.advance(shown.task_ids[0], len(ids))
    return result
