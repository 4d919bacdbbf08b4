"""Numbers of the device that the host reads some steps later, so that no step waits for them."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

BEHIND = 2  # steps; by then the device has long computed the number


class _Sent(NamedTuple):
    """A number on its way: known to the host, or copied into `host` once `event` has happened."""

    host: Tensor | float
    event: Any
    tag: Any


class Delayed:
    """A queue of numbers, each with a tag. On a GPU a number is returned `behind` calls after it was given; on a CPU, or where the host
    knows it, at once, but never before an earlier one. What is returned depends on the calls alone, so it is the same on all ranks.
    """

    def __init__(self, device: torch.device, behind: int | None = None) -> None:
        self._on_gpu = device.type == "cuda"
        self._behind = (BEHIND if self._on_gpu else 0) if behind is None else behind
        self._queue: deque[_Sent] = deque()

    def add(self, value: Tensor | float, tag: Any = None) -> list[tuple[float, Any]]:
        """Give a number (0-dim tensor); the numbers that are due now, with their tags, oldest first."""
        self._queue.append(self._sent(value, tag))
        found = []
        while self._queue and (len(self._queue) > self._behind or not isinstance(self._queue[0].host, Tensor)):
            found.append(self._read())
        return found

    def flush(self) -> list[tuple[float, Any]]:
        """All numbers that were not returned yet; waits for the device."""
        return [self._read() for _ in range(len(self._queue))]

    def _sent(self, value: Tensor | float, tag: Any) -> _Sent:
        if not isinstance(value, Tensor):
            return _Sent(float(value), None, tag)
        if not self._on_gpu:
            return _Sent(value.detach().clone(), None, tag)
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Sent(host, event, tag)

    def _read(self) -> tuple[float, Any]:
        sent = self._queue.popleft()
        if sent.event is not None:
            sent.event.synchronize()
        return float(sent.host), sent.tag
