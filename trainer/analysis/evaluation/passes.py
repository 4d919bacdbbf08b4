"""Forward passes of an evaluation at one density, timed without the loader, with the number of tokens that each image kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity.adaptive import AdaptiveViT
from sparsity.network import SparseNetwork
from sparsity.types import Plan, num_kept
from trainer.data.batch import Batch
from trainer.telemetry.timing import synchronize

EXTREMES = 8  # images with the fewest and the most tokens that are kept for a picture


class Extreme(NamedTuple):
    """An image: count of its patches that stay, label, predicted class, pixels (3, S, S) float32 as in the network, kept patch ids."""

    count: int
    label: int
    predicted: int
    pixels: np.ndarray
    kept: np.ndarray


class Passes:
    """`network` under `plan`, callable as `evaluate` calls a network. selection: its name in the table."""

    def __init__(self, selection: str, network: SparseNetwork, plan: Plan):
        self.selection, self.network, self.plan = selection, network, plan
        self.batch: Batch | None = None
        self._seconds, self._images, self._batches = 0.0, 0, 0

    def __call__(self, images: Tensor, plan: Plan) -> Any:
        synchronize(images.device)
        started = time.perf_counter()
        output = self.run(images)
        synchronize(images.device)
        self._batches += 1
        if self._batches == 1:  # memory is allocated and kernels are chosen in the first one
            self._first = time.perf_counter() - started, len(images)
        else:
            self._seconds, self._images = self._seconds + time.perf_counter() - started, self._images + len(images)
        return output

    def run(self, images: Tensor) -> Any:
        """images (b, 3, S, S) float -> an output with `logits`."""
        return self.network(images, self.plan)

    def watching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the current one is `batch`."""
        for self.batch in batches:
            yield self.batch

    def counts(self) -> np.ndarray | None:
        """Patches that each image kept, (N,) int64; None: as many for every image."""
        return None

    @property
    def rate(self) -> float:
        """Images/s of the passes alone, without the first batch where there are more."""
        seconds, images = (self._seconds, self._images) if self._images else self._first
        return images / max(seconds, 1e-9)


class RandomPasses(Passes):
    """Random tokens, another set for each image, drawn from its pixels, so that batch mates have no influence."""

    def run(self, images: Tensor) -> Any:
        return self.network(images, self.plan, rng_keys=images.double().sum(dim=(1, 2, 3)).view(torch.int64))


class ChosenPasses(Passes):
    """As many tokens as `plan` keeps, in another order than that of importance. order: (images, patches by importance (B, n)) -> positions
    of the patches (B, n), those that stay first."""

    def __init__(self, selection: str, adaptive: AdaptiveViT, plan: Plan, order: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(selection, adaptive.model, plan)
        self.adaptive, self.order = adaptive, order

    def run(self, images: Tensor) -> Any:
        tokens, ranked = self.adaptive.ranked(images)
        order = self.order(images, ranked.order)
        count = num_kept(order.shape[1], self.plan.keep_tokens)
        return self.adaptive.finish(tokens, order, torch.full((len(order),), count, device=order.device))


class AdaptivePasses(Passes):
    """Mass-based selection at the threshold `mass`."""

    def __init__(self, selection: str, adaptive: AdaptiveViT, plan: Plan, mass: float):
        super().__init__(selection, adaptive.model, plan)
        self.adaptive, self.mass = adaptive, mass
        self._counts: list[np.ndarray] = []
        self.fewest: list[Extreme] = []
        self.most: list[Extreme] = []

    def run(self, images: Tensor) -> Any:
        return self.adaptive(images, self.mass)

    def __call__(self, images: Tensor, plan: Plan) -> Any:
        output = super().__call__(images, plan)
        assert self.batch is not None
        there = (self.batch.weights > 0).numpy()
        counts = output.counts.cpu().numpy()
        self._counts.append(counts[there])
        for row in _ends(counts, there):
            one = self._extreme(images, output, row)
            self.fewest = sorted([*self.fewest, one], key=lambda e: e.count)[:EXTREMES]
            self.most = sorted([*self.most, one], key=lambda e: -e.count)[:EXTREMES]
        return output

    def counts(self) -> np.ndarray:
        return np.concatenate(self._counts)

    def _extreme(self, images: Tensor, output: Any, row: int) -> Extreme:
        assert self.batch is not None
        count, pixels = int(output.counts[row]), images[row]
        ranked = self.adaptive.ranked(pixels[None])[1]
        kept = ranked.order[0, :count].sort().values.cpu().numpy()
        return Extreme(count, int(self.batch.labels[row]), int(output.logits[row].argmax()), pixels.float().cpu().numpy(), kept)


def _ends(counts: np.ndarray, there: np.ndarray) -> list[int]:
    """Rows with the EXTREMES lowest and highest counts of a batch."""
    rows = np.flatnonzero(there)
    rows = rows[np.argsort(counts[rows], kind="stable")]
    return list(dict.fromkeys([*rows[:EXTREMES].tolist(), *rows[-EXTREMES:].tolist()]))
