"""The order of the data: which examples make global batch `step` of an epoch. Pure numpy, no ranks, no workers, no files.

An epoch is a pure function of (seed, epoch, kept examples, shard sizes, batch, lanes, window, homes, repeats):

1. Shards are dealt once, by seed, to `homes`; home by home, in an order new in every epoch, the kept examples of the shards
   are laid end to end: one sequence of K ids.
2. The sequence is cut into `lanes` equal ranges. A lane is read as a ring from a start new in every epoch and permuted in
   windows, so window borders and leftovers fall on other examples in every epoch.
3. Global batch b takes the same number of rows from every lane, in lane order, two lanes at a time in turn: neighbours 2i and
   2i + 1, which mixup pairs, come from different lanes, so from different shards (on shards sorted by class neighbours of
   one lane are of one class two hundred times too often: `shuffle_quality`).

With `repeats` R the order is that of epoch div R and the epoch shows part (epoch mod R) of every lane, each example R times in
one batch. Position is (epoch, step) and nothing else, so resuming anywhere on any number of ranks costs nothing. Memory
grows with the number of shards and with lanes x window, beside the packed bits of `keep`.

Letters: S shards, N examples, K kept examples, L lanes, R repeats, m = batch / (L R) examples a lane gives to a batch.
Permutations come from `keyed_hash`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from trainer.config.errors import ConfigError
from trainer.data.keyed_hash import hashed, permutation

_DEAL, _SHARDS, _START, _WINDOW = 1, 2, 3, 4  # keys of the random streams


class Rows(NamedTuple):
    """Rows of a global batch. ids: (b,) int64 examples. copies: (b,) int64, 0 .. repeats - 1."""

    ids: np.ndarray
    copies: np.ndarray


class BatchSplit(NamedTuple):
    """How a rank computes its slice: `accumulation` micro-batches of `micro_batch` rows; slots = their product."""

    micro_batch: int
    accumulation: int
    slots: int


def slice_of(batch: int, world: int, rank: int) -> tuple[int, int]:
    """(start, stop) of a rank's rows in a global batch: contiguous, in whole pairs, as equal as pairs allow."""
    pairs = batch // 2
    if batch % 2 or pairs < world:
        raise ConfigError(
            f"data.batch={batch} on {world} processes: must be even and >= {2 * world}, a pair of rows per process (mixup "
            "pairs neighbours); change data.batch or use fewer processes"
        )
    return 2 * (rank * pairs // world), 2 * ((rank + 1) * pairs // world)


def micro_batches(batch: int, micro_batch: int, world: int) -> BatchSplit:
    """Equal, even micro-batches of at most `micro_batch` rows that hold the longest slice of any rank."""
    if micro_batch < 2 or micro_batch % 2:
        raise ConfigError(f"data.micro_batch={micro_batch}: must be even and >= 2 (mixup pairs neighbours)")
    slice_of(batch, world, 0)
    pairs = -(-batch // 2 // world)
    accumulation = -(-2 * pairs // micro_batch)
    rows = 2 * -(-pairs // accumulation)
    return BatchSplit(rows, accumulation, rows * accumulation)


@dataclass(frozen=True, eq=False)
class Layout:
    """The settings that are constant over the epochs of a run. sizes: (S,) int64 examples of each shard; batch: global."""

    sizes: np.ndarray
    seed: int
    batch: int
    lanes: int
    window: int
    homes: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        group = self.lanes * self.repeats
        if min(self.lanes, self.window, self.homes, self.repeats) < 1 or self.batch % group or self.batch < group:
            raise ConfigError(
                f"data.batch={self.batch}, lanes={self.lanes}, window={self.window}, homes={self.homes}, "
                f"repeats={self.repeats}: all must be >= 1 and the batch a multiple of lanes x repeats; change "
                "data.batch or data.lanes"
            )
        if self.repeats > 1 and self.batch < 2 * self.repeats:
            raise ConfigError(
                f"data.batch={self.batch} with data.repeats={self.repeats}: one distinct image, which mixup would mix "
                f"with itself; use data.batch>={2 * self.repeats}"
            )
        object.__setattr__(self, "sizes", np.ascontiguousarray(self.sizes, dtype=np.int64))

    @cached_property
    def first(self) -> np.ndarray:
        """(S + 1,) int64 first id of each shard, then N."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def home(self) -> np.ndarray:
        """(S,) int64 home of each shard: dealt by seed, equal numbers of shards."""
        home = np.empty(len(self.sizes), dtype=np.int64)
        home[permutation(len(self.sizes), self.seed, _DEAL)] = np.arange(len(self.sizes)) % self.homes
        return home


class EpochOrder:
    """The global batches of one epoch. keep: packed bits as in `Selection`, None = everything.

    num_kept: K. steps: floor(rows / batch), where an epoch has K rows (with repeats: about K / R examples R times).
    Raises ConfigError for an epoch without a full batch, ValueError for a `keep` of another length.
    """

    def __init__(self, layout: Layout, epoch: int, keep: np.ndarray | None = None) -> None:
        self.layout, self.epoch, self.keep = layout, epoch, keep
        lanes, repeats = layout.lanes, layout.repeats
        num_examples = int(layout.first[-1])
        if keep is not None and len(keep) != -(-num_examples // 8):
            raise ValueError(
                f"keep: {len(keep)} bytes for {num_examples} examples, expected {-(-num_examples // 8)}; it belongs to another data set"
            )
        counts = layout.sizes if keep is None else _count(keep, layout.first)
        self._round = epoch // repeats
        shards = np.arange(len(layout.sizes))
        self._shards = np.lexsort((hashed(layout.seed, _SHARDS, self._round, shards), layout.home))
        self._starts = np.concatenate([[0], np.cumsum(counts[self._shards])])  # (S + 1,) place of a shard in the sequence
        self.num_kept = int(self._starts[-1])
        cells = np.arange(lanes * repeats + 1) * self.num_kept // (lanes * repeats)  # lane by lane, part by part
        part = epoch % repeats
        self._lane = cells[::repeats]  # (L + 1,)
        self._begin = cells[part:-1:repeats] - self._lane[:-1]  # (L,) where this epoch's part of a lane begins
        self._end = cells[part + 1 :: repeats] - self._lane[:-1]
        self._per_lane = layout.batch // (lanes * repeats)
        self.steps = int((self._end - self._begin).min()) // self._per_lane
        if self.steps == 0:
            raise ConfigError(
                f"epoch {epoch}: {self.num_kept} kept examples are too few for a batch of data.batch={layout.batch} rows; use a "
                "smaller data.batch or keep more examples"
            )
        self._windows: dict[int, tuple[int, np.ndarray]] = {}  # the current window of each lane: {lane: (window, its ids)}

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start .. stop of global batch `step`; touches only the lanes these rows come from."""
        stop = self.layout.batch if stop is None else stop
        if not 0 <= step < self.steps or not 0 <= start <= stop <= self.layout.batch:
            raise IndexError(f"batch {step} of {self.steps}, rows {start}:{stop} of {self.layout.batch}")
        examples, copies = self._examples(np.arange(start, stop))
        if not len(examples):
            return Rows(examples, copies)
        low, high = int(examples.min()), int(examples.max()) + 1
        lanes, places = self._places(np.arange(low, high))
        ids = np.empty(high - low, dtype=np.int64)
        for lane in range(int(lanes.min()), int(lanes.max()) + 1):
            here = lanes == lane
            if here.any():
                begin = int(self._begin[lane]) + step * self._per_lane + int(places[here][0])
                ids[here] = self._take(lane, begin, begin + int(here.sum()))
        return Rows(ids[examples - low], copies)

    def leftover(self) -> np.ndarray:
        """Sorted ids of this epoch that fill no batch; times repeats they are less than one batch."""
        used = self._begin + self.steps * self._per_lane
        ids = [self._take(lane, int(a), int(b)) for lane, (a, b) in enumerate(zip(used, self._end, strict=True)) if b > a]
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *ids]))

    def _examples(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch -> (example among the batch's distinct ones, copy).

        Two examples a, b lie as a0 b0 a1 b1 ...: neighbours 2i, 2i + 1 are never copies of one image. Where the number of
        distinct examples is odd (then R is even), the last three lie as a0 b0 c0 a1 b1 c1.
        """
        repeats = self.layout.repeats
        distinct = self.layout.batch // repeats
        pair, place = np.divmod(rows, 2 * repeats)
        examples, copies = 2 * pair + place % 2, place // 2
        odd = distinct - 3 if distinct % 2 and repeats > 1 else distinct
        three = rows - odd * repeats
        if repeats == 1:
            return rows, np.zeros_like(rows)
        return np.where(three < 0, examples, odd + three % 3), np.where(three < 0, copies, three // 3)

    def _places(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct examples of a batch -> (lane, place among the m rows of that lane); an odd last lane has no partner."""
        m, lanes = self._per_lane, self.layout.lanes
        block, place = np.divmod(examples, 2 * m)
        alone = examples >= lanes // 2 * 2 * m
        return np.where(alone, lanes - 1, 2 * block + place % 2), np.where(alone, place, place // 2)

    def _take(self, lane: int, begin: int, end: int) -> np.ndarray:
        """Ids at places begin .. end of a lane's permuted ring."""
        window = self.layout.window
        ids = np.empty(end - begin, dtype=np.int64)
        for w in range(begin // window, (end - 1) // window + 1):
            a, b = max(begin, w * window), min(end, (w + 1) * window)
            ids[a - begin : b - begin] = self.window_of(lane, w)[a - w * window : b - w * window]
        return ids

    def window_of(self, lane: int, window: int) -> np.ndarray:
        """Ids of one window of a lane, in the order they are presented."""
        cached = self._windows.get(lane)
        if cached is not None and cached[0] == window:
            return cached[1]
        ids = np.concatenate([self._sequence(begin, end) for begin, end in self._spans(lane, window)])
        ids = ids[permutation(len(ids), self.layout.seed, self._round, lane, _WINDOW, window)]
        self._windows[lane] = (window, ids)
        return ids

    def lanes_of(self, start: int, stop: int) -> np.ndarray:
        """Lanes that rows start .. stop of a global batch come from, rising."""
        return np.unique(self._places(np.unique(self._examples(np.arange(start, stop))[0]))[0])

    def window_at(self, step: int) -> np.ndarray:
        """(L,) window that each lane is in at global batch `step`."""
        return (self._begin + step * self._per_lane) // self.layout.window

    def shards_of(self, lane: int, window: int) -> np.ndarray:
        """Shards that a window of a lane is read from."""
        found = []
        for begin, end in self._spans(lane, window):
            a = int(np.searchsorted(self._starts, begin, side="right")) - 1
            b = int(np.searchsorted(self._starts, end, side="left"))
            found.append(self._shards[a:b][np.diff(self._starts[a : b + 1]) > 0] if end > begin else self._shards[:0])
        return np.concatenate(found)

    def _spans(self, lane: int, window: int) -> list[tuple[int, int]]:
        """The (one or two) ranges of the epoch's sequence that a window of a lane's ring covers."""
        start, length = int(self._lane[lane]), int(self._lane[lane + 1] - self._lane[lane])
        turn = int(hashed(self.layout.seed, self._round, lane, _START) % np.uint64(length))
        begin = turn + window * self.layout.window
        end = turn + min(length, (window + 1) * self.layout.window)
        cut = min(max(begin, length), end)  # the ring closes here
        return [(start + begin, start + cut), (start + cut - length, start + end - length)]

    def _sequence(self, begin: int, end: int) -> np.ndarray:
        """Ids at places begin .. end of the epoch's sequence of kept examples."""
        if begin >= end:
            return np.empty(0, dtype=np.int64)
        a = int(np.searchsorted(self._starts, begin, side="right")) - 1
        b = int(np.searchsorted(self._starts, end, side="left"))
        shards = self._shards[a:b]
        first, sizes = self.layout.first[shards], self.layout.sizes[shards]
        ends = np.cumsum(sizes)
        ids = np.repeat(first - (ends - sizes), sizes) + np.arange(ends[-1])  # all ids of these shards, shard by shard
        if self.keep is not None:
            ids = ids[(self.keep[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 1]
        return ids[begin - self._starts[a] :][: end - begin]


def _count(keep: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Kept examples between borders: keep packed bits, borders (S + 1,) ids -> (S,) int64."""
    words = np.zeros(len(keep) // 8 + 1, dtype="<u8")
    words.view(np.uint8)[: len(keep)] = keep
    before = np.zeros(len(words) + 1, dtype=np.int64)
    np.cumsum(np.bitwise_count(words), out=before[1:], dtype=np.int64)
    word, bit = borders >> 6, (borders & 63).astype(np.uint64)
    inside = words[word] & ((np.uint64(1) << bit) - np.uint64(1))
    return np.diff(before[word] + np.bitwise_count(inside))
