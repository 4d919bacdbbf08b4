"""What the methods of level 4 share: their settings, the phases of a run, the masks.

Phases by epoch: dense until `start`, a penalty moves the weights until `prune`, then the groups with the least energy are pruned for
good and the rest is trained on ("masked retraining"). A `Pruning` sees whole tensors only; where they are stored is the trainer's concern.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsity.settings import ByRun, Epochs, Keep, Range, Settings, SettingsError, setting
from sparsity.weights.groups import Site, Weights, block_sites, head_sites, matches, unit_sites
from sparsity.weights.projection import spread

Size = Annotated[int, Range("count", least=1)]
Factor = Annotated[float, Range("factor", above=0.0)]
BLOCK = (16, 64)  # default of `block`
BLOCKED = ("columns", "rows")  # groups inside blocks


@dataclass(frozen=True)
class WeightSettings(Settings):
    """Base of the settings of level 4."""

    section: ClassVar[str] = "weights"
    moves_weights: ClassVar[bool] = False  # whether `Pruning.pulled` changes weights between two updates

    def build(self, vit: nn.Module) -> Pruning:
        """The level over the layers of a timm VisionTransformer. Raises ValueError, naming key and remedy."""
        raise NotImplementedError

    def refuse_epochs(self, epochs: float) -> None:
        """Raises ValueError if a run of `epochs` would end before groups are pruned."""

    @property
    def without_effect(self) -> str:
        """Why nothing is pruned though a method is set; "" where something is."""
        return ""

    @property
    def unused(self) -> str:
        """A key that these settings do not read, with its value and the remedy; "" for none."""
        return ""

    @property
    def summary(self) -> str:
        """What is pruned when, for the plan of a run; "" if nothing does."""
        return ""


@dataclass(frozen=True)
class PruneSettings(WeightSettings):
    """Base of the methods that remove groups."""

    keep: Keep = setting(1.0, "share of the groups that is kept; 1 = all, so that training is unchanged")
    groups: Literal["columns", "rows", "units", "heads"] = setting(
        "columns",
        "what is pruned together: columns or rows inside the blocks of a linear layer; units, hidden units of an MLP (rows of fc1 with "
        "columns of fc2); heads of an attention. units and heads give smaller dense layers",
    )
    block: tuple[Size, Size] = setting(
        BLOCK,
        "rows and columns of a block, for columns and rows. Layers that they do not divide are padded with zeros, so the last blocks are "
        "smaller",
    )
    per: Literal["block", "layer", "network"] = setting(
        "block",
        "what `keep` is a share of: of the groups of every block (equal numbers in all full blocks; units and heads: one block per layer), "
        "of a layer or of the network, by one threshold",
    )
    layers: tuple[str, ...] = setting(
        ("*",),
        "patterns of module names that are pruned, whole names or their end, e.g. [mlp.fc1, mlp.fc2]; units: e.g. [mlp], heads: [attn]",
    )
    prune: Epochs = setting(
        150.0,
        "epoch at which groups are pruned; from then on the kept ones are retrained",
        ByRun("half of the epochs", lambda run, given: float(run.epochs // 2)),
    )

    def build(self, vit: nn.Module) -> Pruning:
        sites = chosen(sites_of(vit, self.groups, self.block), self.layers)
        return Pruning() if self.keep == 1.0 else self._build(sites)

    def _build(self, sites: Sequence[Site]) -> Pruning:
        raise NotImplementedError

    @property
    def summary(self) -> str:
        blocks = f" of {self.block[0]} x {self.block[1]} blocks" if self.groups in BLOCKED else ""
        return (
            f"{self.keep:.3g} of the {self.groups}{blocks} (per {self.per}) from epoch {self.prune:g} on"
            if self.keep < 1.0
            else ""
        )

    @property
    def without_effect(self) -> str:
        return "weights.keep=1, so all weights are kept; set weights.keep below 1" if self.keep == 1.0 else ""

    @property
    def unused(self) -> str:
        if self.groups in BLOCKED or self.block == BLOCK:
            return ""
        return (
            f"weights.block={list(self.block)}: not a setting of weights.groups={self.groups}; set weights.groups={'|'.join(BLOCKED)}, or "
            "remove weights.block"
        )

    def refuse_epochs(self, epochs: float) -> None:
        if self.keep < 1.0 and self.prune > epochs - 1:
            raise ValueError(
                f"weights.prune={self.prune:g}ep with epochs={epochs:g}: no group would be pruned; set weights.prune <= "
                f"{epochs - 1:g}ep"
            )


@dataclass(frozen=True)
class PenaltySettings(PruneSettings):
    """Base of the methods that move weights before they prune."""

    moves_weights: ClassVar[bool] = True
    start: Epochs = setting(0.0, "epoch from which on the penalty moves the weights")
    every: Epochs = setting(1.0, "epochs between two updates of the penalty")

    @property
    def summary(self) -> str:
        return f"{super().summary}; a penalty from epoch {self.start:g} on" if self.keep < 1.0 else ""

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {"start": self.start, "every": self.every}
        if self.every <= 0:
            raise SettingsError(self.section, values, {"every": "must be > 0"})
        if self.keep < 1.0 and self.start >= self.prune:
            raise SettingsError(self.section, values, {"start": f"must be < weights.prune={self.prune:g}ep"})


class Pruning:
    """The state of level 4, and the identity by itself: no layer is pruned.

    parameters: the names that it changes, timm's. kept: which groups are kept, {site: (blocks, groups) bool}, from `prune` on, else None.
    """

    def __init__(self) -> None:
        self.sites: Sequence[Site] = ()
        self.kept: dict[str, Tensor] | None = None
        self._masks: dict[str, Tensor] | None = None

    @property
    def parameters(self) -> list[str]:
        return [name for site in self.sites for name in site.shapes]

    @property
    def moves(self) -> bool:
        """Whether `pulled` changes weights now."""
        return False

    def begin_epoch(self, epoch: int, weights: Callable[[], Weights]) -> str:
        """The event at the start of `epoch`: "updated" (the penalty), "pruned" (groups are pruned now), or "". Once per epoch of a run.
        weights: reads the parameters whole; called only where something is due."""
        return ""

    def pulled(self, name: str, values: Tensor, begin: int, lr: float) -> Tensor:
        """The penalty's part of an optimizer step with learning rate `lr`: new values of elements begin .. begin + len(values) of the
        flattened parameter `name`. Elementwise, so any partition of a parameter gives the same numbers."""
        return values

    def masks(self) -> dict[str, Tensor]:
        """True where an element is kept, False where it is pruned, {parameter: its shape}; {} before `prune`."""
        if self.kept is None:
            return {}
        if self._masks is None:
            self._masks = spread(self.sites, self.kept)
        return self._masks

    def shares(self) -> dict[str, float]:
        """Kept share of each layer: by name of a linear layer of its weight, by name of an attention of its heads; {} before `prune`."""
        masks, kept = self.masks(), self.kept or {}
        groups = {
            site.name: float(
                (kept[site.name] & (site.counts() > 0).to(kept[site.name].device)).double().sum() / (site.counts() > 0).sum()
            )
            for site in self.sites
            if kept
        }
        weights = {name: mask for name, mask in masks.items() if name.endswith(".weight")}
        return groups | {name.removesuffix(".weight"): float(mask.double().mean()) for name, mask in weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resume needs, whole, on the CPU."""
        return {f"kept.{name}": stays.cpu() for name, stays in (self.kept or {}).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """The reverse of `state_dict`. Raises ValueError for the state of other layers or groups."""
        self._refuse_other(state)
        kept = {name.removeprefix("kept."): value.to(device) for name, value in state.items() if name.startswith("kept.")}
        self.kept, self._masks = kept or None, None

    def _refuse_other(self, state: Mapping[str, Tensor]) -> None:
        mine = {f"kept.{site.name}": tuple(site.counts().shape) for site in self.sites}
        theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith("kept.")}
        wrong = sorted(name for name in (mine | theirs) if mine.get(name) != theirs.get(name)) if theirs else []
        if wrong:
            name = wrong[0].removeprefix("kept.")
            was, now = (list(found.get(wrong[0], ())) or "none" for found in (theirs, mine))
            raise ValueError(
                f"masks of another run: groups of {name} are {was} there, {now} here; resume with the weights.* of that run, or start a "
                "new run with name=NEW_NAME"
            )


def due(settings: PenaltySettings, epoch: int) -> bool:
    """Whether the penalty is updated at the start of `epoch`: at the first epoch from `start` on, then every `every`."""

    def updates(at: int) -> int:
        return -1 if at < settings.start else int((at - settings.start) // settings.every)

    return updates(epoch) > updates(epoch - 1)


def sites_of(vit: nn.Module, groups: str, block: tuple[int, int]) -> Sequence[Site]:
    """The layers of a VisionTransformer that could be pruned. Raises ValueError for a network whose groups depend on each other."""
    if groups == "units":
        return unit_sites(vit)
    if groups == "heads":
        return head_sites(vit)
    return block_sites(vit, (block[0], block[1]), axis=1 if groups == "columns" else 0)


def chosen(sites: Sequence[Site], patterns: Sequence[str]) -> list[Site]:
    """The sites that fit a pattern of `weights.layers`. Raises ValueError, with the nearest names, for a pattern that fits none."""
    names = [site.name for site in sites]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            ends = list(dict.fromkeys(".".join(name.split(".")[2:]) for name in names))
            near = difflib.get_close_matches(pattern, [*names, *ends], n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"names are {names[0]} to {names[-1]}"
            raise ValueError(f"weights.layers={pattern!r}: fits no layer that can be pruned; {hint}")
    if not patterns:
        raise ValueError(f"weights.layers=[]: no layer is pruned; name layers, e.g. [{names[0]}], or set weights.method=all")
    return [site for site in sites if any(matches(site.name, pattern) for pattern in patterns)]
