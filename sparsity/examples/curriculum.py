"""The base classes of level 1: observations gathered once per epoch, draws by class, the selection of an epoch.

A method is two classes in one file: its settings (a subclass of `ExampleSettings`) and its algorithm (of `Curriculum` or `Observer`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity.examples.by_class import first_per_group, keep_rates, quotas
from sparsity.examples.observations import Observations, Observed
from sparsity.settings import RunLength, Settings
from sparsity.types import Gather, Observation, Selection


class Draw(IntEnum):
    """The purpose of a random draw; each has its own stream of numbers."""

    START = 0
    CYCLE = 1
    RESTORED = 2
    PRUNED = 3


class TrainingRun(NamedTuple):
    """The run that a method of level 1 is built for. num_examples: N. labels: (N,) int class of each example. epochs: of the whole run.

    repeats: epochs in which the stream presents every kept example (repeated augmentation); the selection changes only between such
    rounds. probe_share: share of the kept examples that is observed after each epoch (`probe`); None: each presentation is observed.
    """

    num_examples: int
    labels: np.ndarray
    epochs: int
    seed: int = 0
    repeats: int = 1
    probe_share: float | None = None


@dataclass(frozen=True)
class ExampleSettings(Settings):
    """Base of the settings of level 1. `removed`, `anneal` and `balanced` mean the same in every method that has them:
    the share of the data set left out of an epoch, the last share of the epochs that shows everything, and whether every class loses
    the same share.

    shares_known: whether `removed` alone determines how many examples an epoch shows; if not, only the run can count them.
    counts_forgetting: whether a checkpoint has forgetting events of each example, as in `Forgetting`.
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
        """The share of examples that an epoch leaves out, as text."""
        return f"removed {self.left_out:g} of the data set"

    def all_from(self, epochs: int, repeats: int) -> int:
        """The first epoch of the last share of a run (`anneal`), which shows everything.

        Whole rounds of `repeats` epochs only: the selection does not change inside a round.
        """
        shown = epochs - round(self._anneal * epochs)
        return -(-shown // repeats) * repeats

    def never_acts(self, run: RunLength) -> str:
        """Why the method would do nothing in a whole run, with key, value and remedy; "" if it acts, or is set to leave nothing out."""
        if self.left_out and not self.all_from(*run):
            return f"examples.anneal={self._anneal:g}: all {run.epochs} epochs show every example; set a smaller share"
        return ""

    def acts_in_part(self, run: RunLength) -> list[str]:
        """What the method does less often in this run than its settings name."""
        if getattr(self, "removed", 1) == 0 and not self.counts_forgetting:
            return ["examples.removed=0: every epoch shows every example; set examples.removed above 0, or examples.method=all"]
        if self._anneal and self.all_from(*run) >= run.epochs:
            return [f"examples.anneal={self._anneal:g} of {run.epochs} epochs is none, so no epoch shows every example"]
        return []

    @property
    def reads_attention(self) -> tuple[str, str]:
        """The setting that reads the attention of the last block, as key=value, and the remedy for a network without; ("", "") for none."""
        return "", ""

    @property
    def _anneal(self) -> float:
        return float(getattr(self, "anneal", 0.0))


class Curriculum:
    """A method of level 1. A subclass defines its statistics (`_update_statistics`) and the selection of an epoch (`_select`).

    Raises ValueError for settings that cannot be met, naming key, value and remedy.
    """

    name: ClassVar[str]
    observes: ClassVar[Literal["loss"] | None] = None
    decides_state: ClassVar[tuple[str, ...]] = ()  # settings that determine the arrays of the state
    wants_spread = False

    def __init__(self, settings: ExampleSettings, run: TrainingRun):
        num_examples = run.num_examples
        if len(run.labels) != num_examples:
            raise ValueError(
                f"examples: {len(run.labels)} labels for {num_examples} examples; run `trilevel index` on the shards again"
            )
        self.num_examples, self.labels, self.seed, self.repeats = num_examples, np.asarray(run.labels), run.seed, run.repeats
        self.probe_share = run.probe_share
        self.num_removed = round(settings.left_out * num_examples)
        if settings.left_out and not 0 < self.num_removed < num_examples:
            raise ValueError(
                f"examples.removed={settings.left_out} leaves out {self.num_removed} of {num_examples} examples; set a share "
                "that removes some and keeps some, or examples.method=all"
            )
        self.anneal_from = settings.all_from(run.epochs, run.repeats)
        self.updated = 0  # number of updates of the selection
        balanced = getattr(settings, "balanced", False)
        self.group = self.labels if balanced else np.broadcast_to(np.int8(0), num_examples)  # one byte, not N
        self.settings: Any = settings  # of the subclass's settings class
        self._start()

    def _start(self) -> None:
        """Check the settings and create the state of epoch 0."""

    def allocate(self, device: torch.device) -> None:
        """Make what `observe` writes to; nothing in methods without statistics."""

    def observe(self, ids: Tensor, observation: Observation) -> None:
        """Called every step; does nothing in methods without statistics."""

    def uses_observations(self, epoch: int) -> bool:
        """Whether observations of `epoch` may change a later selection."""
        return epoch + 1 < self.anneal_from

    def select(self, epoch: int, gather: Gather) -> Selection:
        """The selection of `epoch`, equal on all ranks; collective. A second call returns the same."""
        self._gathered(gather)
        return self._everything() if epoch >= self.anneal_from else self._select(epoch)

    def state_dict(self, gather: Gather) -> dict[str, np.ndarray]:
        """Complete and equal on all ranks; collective. Includes the observations of the current epoch so far."""
        self._gathered(gather)
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise ValueError(
                f"examples.method={self.name} has no state, the checkpoint has {sorted(state)}; resume with the checkpoint's method"
            )

    @property
    def state_bytes(self) -> int:
        """Bytes of the state on the host, without the labels, which belong to the index."""
        arrays = [v for v in vars(self).values() if isinstance(v, np.ndarray) and v is not self.labels]
        return sum(
            v.nbytes if any(v.strides) else v.itemsize for v in arrays
        )  # without strides it is one value, broadcast N times

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
        """A generator with the same stream on every rank."""
        return np.random.default_rng((self.seed, int(purpose), number))

    def _starting_set(self) -> np.ndarray:
        """(N,) bool: all but the last `removed` share of one permutation; the same share of every class if balanced."""
        order = self._draw(Draw.START).permutation(self.num_examples)
        keep = np.ones(self.num_examples, dtype=bool)
        keep[first_per_group(order[::-1], self.group, quotas(np.bincount(self.group), self.num_removed))] = False
        return keep


class Observer(Curriculum):
    """A method with statistics of its observations."""

    def __init__(self, settings: ExampleSettings, run: TrainingRun):
        super().__init__(settings, run)
        self._observations = Observations(run.num_examples, "spread" if self.wants_spread else self.observes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state on host and device."""
        return super().state_bytes + self._observations.state_bytes

    def allocate(self, device: torch.device) -> None:
        self._observations.allocate(device)

    def observe(self, ids: Tensor, observation: Observation) -> None:
        self._observations.record(ids, observation)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Raises ValueError for the state of another method or another data set."""
        mine = self._arrays()
        found, wanted = ({key: value.shape for key, value in arrays.items()} for arrays in (state, mine))
        if found != wanted:
            own = "".join(f", examples.{key}={getattr(self.settings, key)}" for key in self.decides_state)
            raise ValueError(
                f"examples.method={self.name}{own} has state {wanted}, the checkpoint has {found}; use the method, "
                "settings and shards of the checkpoint"
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
    """Hash of a selection: packed bits and weights (N,) float32 or None -> 16 hex digits."""
    digest = hashlib.blake2b(keep.tobytes(), digest_size=8)
    if weight is not None:
        digest.update(weight.tobytes())
    return digest.hexdigest()
