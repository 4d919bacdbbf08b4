"""What all methods of level 1 share: observations gathered once per epoch, draws by class, the selection of an epoch.

A method is two classes in one file: its settings (a dataclass on `ExampleSettings`) and what it does with them (on `Curriculum` or
`Observer`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor

from sparsity.examples.observations import Observations, Observed
from sparsity.settings import Settings
from sparsity.types import Gather, Observation, Selection


class Draw(IntEnum):
    """What a random draw is about; each purpose has its own stream of numbers."""

    START = 0
    CYCLE = 1
    RESTORED = 2
    PRUNED = 3


class TrainingRun(NamedTuple):
    """What a method of level 1 is built for. num_examples: N. labels: (N,) int class of each example. epochs: of the whole run.

    repeats: epochs in which the stream presents every kept example (repeated augmentation); what is shown changes only between such
    rounds.
    """

    num_examples: int
    labels: np.ndarray
    epochs: int
    seed: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class ExampleSettings(Settings):
    """Base of the settings of level 1. `removed`, `anneal` and `balanced` mean the same in every method that has them:
    the share of the data set left out of an epoch, the last share of the epochs that shows everything, and whether every class loses
    the same share.

    shares_known: whether `removed` alone tells how many examples an epoch shows; else only the run can tell.
    counts_forgetting: whether a checkpoint has forgetting events of each example, as `Forgetting` keeps them.
    """

    section: ClassVar[str] = "examples"
    shares_known: ClassVar[bool] = True
    counts_forgetting: ClassVar[bool] = False

    def build(self, run: TrainingRun) -> Curriculum:
        """The method over a data set, see `Curriculum`. Raises ValueError, naming key, value and remedy."""
        raise NotImplementedError

    @property
    def left_out(self) -> float:
        """The setting `removed`, 0 for a method without."""
        return float(getattr(self, "removed", 0.0))

    @property
    def summary(self) -> str:
        """How many examples an epoch leaves out, for a person."""
        return f"removed {self.left_out:g} of the data set"

    def all_from(self, epochs: int, repeats: int) -> int:
        """The first epoch of the last share of a run (`anneal`), which shows everything.

        Whole rounds of `repeats` epochs only: an epoch in the middle of a round shows what the round began with.
        """
        shown = epochs - round(float(getattr(self, "anneal", 0.0)) * epochs)
        return -(-shown // repeats) * repeats


class Curriculum:
    """A method of level 1. A subclass says what it remembers (`_update_statistics`) and what an epoch shows (`_select`).

    Raises ValueError for settings that can't be met, naming key, value and remedy.
    """

    name: ClassVar[str]
    observes: ClassVar[Literal["loss"] | None] = None
    decides_state: ClassVar[tuple[str, ...]] = ()  # settings that decide which arrays the state has
    wants_spread = False

    def __init__(self, settings: ExampleSettings, run: TrainingRun):
        num_examples = run.num_examples
        if len(run.labels) != num_examples:
            raise ValueError(f"examples: {len(run.labels)} labels for {num_examples} examples: rebuild the index of the shards")
        self.num_examples, self.labels, self.seed, self.repeats = num_examples, np.asarray(run.labels), run.seed, run.repeats
        self.num_removed = round(settings.left_out * num_examples)
        if settings.left_out and not 0 < self.num_removed < num_examples:
            raise ValueError(
                f"examples.removed={settings.left_out} leaves out {self.num_removed} of {num_examples} examples: take a share "
                "that removes some and keeps some, or examples.method=all"
            )
        self.anneal_from = settings.all_from(run.epochs, run.repeats)
        self.updated = 0  # how often what is shown was chosen anew
        balanced = getattr(settings, "balanced", False)
        self.group = self.labels if balanced else np.broadcast_to(np.int8(0), num_examples)  # one byte, not N
        self.settings: Any = settings  # of the subclass's own kind
        self._start()

    def _start(self) -> None:
        """Refuse settings and make the state of epoch 0."""

    def observe(self, ids: Tensor, observation: Observation) -> None:
        """Every step; a method that watches nothing has nothing to do."""

    def select(self, epoch: int, gather: Gather) -> Selection:
        """What `epoch` shows, the same on all ranks; collective. Asked twice, it shows the same."""
        self._gathered(gather)
        return self._everything() if epoch >= self.anneal_from else self._select(epoch)

    def state_dict(self, gather: Gather) -> dict[str, np.ndarray]:
        """Whole and the same on all ranks; collective. What was seen so far in this epoch is folded in first."""
        self._gathered(gather)
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise ValueError(f"examples.method={self.name} keeps no state, the checkpoint holds {sorted(state)}")

    @property
    def state_bytes(self) -> int:
        """Of the state on the host, the labels left out: the index holds them."""
        arrays = [v for v in vars(self).values() if isinstance(v, np.ndarray) and v is not self.labels]
        return sum(v.nbytes if any(v.strides) else v.itemsize for v in arrays)  # without strides it is one value, shown N times

    def _gathered(self, gather: Gather) -> None: ...

    def _select(self, epoch: int) -> Selection:
        raise NotImplementedError

    def _everything(self) -> Selection:
        return self._selection(np.ones(self.num_examples, dtype=bool))

    def _selection(self, keep: np.ndarray, weight: np.ndarray | None = None, **facts: Any) -> Selection:
        """keep: (N,) bool. weight: (N,) float32 or None."""
        packed = np.packbits(keep, bitorder="little")
        rates = keep_rates(keep, self.labels)
        num_kept = int(keep.sum())
        about = {
            "method": self.name,
            "hash": selection_hash(packed, weight),
            "kept": num_kept,
            "kept_share": num_kept / self.num_examples,
            "swapped": 0,
            "update": self.updated,
            "class_keep_min": float(np.nanmin(rates)),
            "class_keep_max": float(np.nanmax(rates)),
        }
        return Selection(packed, num_kept, weight, about | facts)

    def _draw(self, purpose: Draw, number: int = 0) -> np.random.Generator:
        """The same stream of random numbers on every rank."""
        return np.random.default_rng((self.seed, int(purpose), number))

    def _starting_set(self) -> np.ndarray:
        """(N,) bool: all but the last `removed` share of one permutation; of every class alike where balanced."""
        order = self._draw(Draw.START).permutation(self.num_examples)
        keep = np.ones(self.num_examples, dtype=bool)
        keep[first_per_group(order[::-1], self.group, quotas(np.bincount(self.group), self.num_removed))] = False
        return keep


class Observer(Curriculum):
    """A method that remembers what it saw."""

    def __init__(self, settings: ExampleSettings, run: TrainingRun):
        super().__init__(settings, run)
        self._observations = Observations(run.num_examples, "spread" if self.wants_spread else self.observes)

    @property
    def state_bytes(self) -> int:
        """Of the state on host and device."""
        return super().state_bytes + self._observations.state_bytes

    def observe(self, ids: Tensor, observation: Observation) -> None:
        self._observations.record(ids, observation)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Raises ValueError for the state of another method or another data set."""
        mine = self._arrays()
        found, wanted = ({key: value.shape for key, value in arrays.items()} for arrays in (state, mine))
        if found != wanted:
            own = "".join(f", examples.{key}={getattr(self.settings, key)}" for key in self.decides_state)
            raise ValueError(
                f"examples.method={self.name}{own} keeps {wanted}, the checkpoint holds {found}: go on with the method, "
                "its settings and the shards of the checkpoint"
            )
        self._observations.clear()
        self._restore(state)

    def state_dict(self, gather: Gather) -> dict[str, np.ndarray]:
        self._gathered(gather)
        return {key: value.copy() for key, value in self._arrays().items()}

    def _gathered(self, gather: Gather) -> None:
        self._update_statistics(self._observations.gather(gather))

    def _update_statistics(self, observed: Observed) -> None:
        raise NotImplementedError

    def _arrays(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        raise NotImplementedError


def selection_hash(keep: np.ndarray, weight: np.ndarray | None) -> str:
    """Name of a selection: packed bits and weights (N,) float32 or None -> 16 hex digits."""
    digest = hashlib.blake2b(keep.tobytes(), digest_size=8)
    if weight is not None:
        digest.update(weight.tobytes())
    return digest.hexdigest()


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total`, or all there is, shared out by `sizes` (G,), largest remainder first; none above its size. (G,) int64"""
    sizes = sizes.astype(np.int64)
    total = min(total, int(sizes.sum()))
    whole, rest = np.divmod(sizes * total, max(int(sizes.sum()), 1))
    missing = total - int(whole.sum())
    whole[np.lexsort((np.arange(len(sizes)), -rest))[:missing]] += 1
    return whole


def first_per_group(ids: np.ndarray, group: np.ndarray, quota: np.ndarray, skip: int = 0) -> np.ndarray:
    """The first quota[g] of each group g in the order of `ids` (n,); with `skip`, the skip-th such part, going round."""
    of = group[ids]
    by = np.argsort(of, kind="stable")
    ids, of = ids[by], of[by]
    sizes = np.bincount(of, minlength=len(quota))
    rank = np.arange(len(ids)) - (np.cumsum(sizes) - sizes)[of]
    if skip:
        rank = (rank - skip * quota[of]) % sizes[of]
    return ids[rank < quota[of]]


def keep_rates(keep: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of each class that is kept, (C,) float64; NaN for a class without examples. keep: (N,) bool."""
    sizes = np.bincount(labels)
    kept = np.bincount(labels[keep], minlength=len(sizes))
    return np.divide(kept, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)
