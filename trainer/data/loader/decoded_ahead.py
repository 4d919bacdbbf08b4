"""Batches decoded on the device while it trains on those before: in a thread and a stream of their own, two batches ahead.

TorchCodec waits for nvJPEG before it returns, so in the loop's own thread each step would wait for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from trainer.data.augment.decode_on_device import DeviceDecoder
from trainer.data.batch import Batch

AHEAD = 2


class DecodedAhead:
    """Call it with the batches of an epoch. make: builds the decoder in the first epoch, because a process that forks workers may not have
    used the GPU. On a CPU each batch is decoded when it is asked for."""

    def __init__(self, make: Callable[[], DeviceDecoder]) -> None:
        self._make = make
        self._decoder: DeviceDecoder | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._stream: Any = None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        if self._decoder is None:
            self._decoder = self._make()
        if self._decoder.device.type != "cuda":
            yield from map(self._decoder, batches)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="nvjpeg")
        waiting: deque[Future[tuple[Batch, Any]]] = deque()
        try:
            for batch in batches:
                waiting.append(self._thread.submit(self._decode, self._decoder, batch))
                if len(waiting) > AHEAD:
                    yield _usable(*waiting.popleft().result())
            while waiting:
                yield _usable(*waiting.popleft().result())
        finally:  # the epoch was left: what was not begun is not decoded
            for one in waiting:
                one.cancel()

    def _decode(self, decoder: DeviceDecoder, batch: Batch) -> tuple[Batch, Any]:
        """The decoded batch, and the event after its last kernel."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(decoder.device)
        with torch.cuda.device(decoder.device), torch.cuda.stream(self._stream):
            decoded, done = decoder(batch), torch.cuda.Event()
            done.record(self._stream)
        return decoded, done


def _usable(batch: Batch, done: Any) -> Batch:
    """For the current stream. Its memory is the other stream's, and must not be given away before this one has read it."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(done)
    batch.images.record_stream(current)
    return batch
