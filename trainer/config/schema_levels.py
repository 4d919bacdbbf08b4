"""Sections of a configuration for what is left out: examples, tokens, connections, weights, and the plan of both keep ratios.

The settings of a method stand in its own file in `sparsity`; here is what all methods of a level share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sparsity.settings import ConnectionSettings, Settings, TokenSettings
from trainer.config.method_section import RULE_SETTINGS, MethodSection
from trainer.config.values import Blocks

if TYPE_CHECKING:
    from sparsity.examples.curriculum import ExampleSettings
    from sparsity.examples.probe import ProbeSettings
    from sparsity.schedule import PlanSettings
    from sparsity.weights.pruning import WeightSettings


class ExamplesConfig(MethodSection):
    """Level 1, which examples an epoch shows. Keys beside these: the settings of the method, see `sparsity.examples`
    (docs/methods.md, section Examples)."""

    if TYPE_CHECKING:
        settings: ExampleSettings = cast(Any, None)

    rule: Literal["clear", "without_partner", "dominant", "authors", "probe"] = "clear"
    """When an image counts as right. In the training batches, mixed ones included: `clear`, `without_partner`, `dominant` or `authors`;
    on clean images after each epoch: `probe` (docs/methods.md, section Examples)."""
    rule_settings: Any = Field(default=None, validate_default=True)

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.examples import EXAMPLES  # it imports torch, which reading a journal does not need

        return EXAMPLES

    @classmethod
    def choices(cls) -> Mapping[str, Mapping[str, type[Settings]]]:
        from sparsity.examples import RULES

        return {"method": cls.methods(), "rule": RULES}

    @field_validator(RULE_SETTINGS, mode="plain")
    @classmethod
    def _of_rule(cls, raw: Any, info: ValidationInfo) -> Settings | None:
        return cls._read_chosen("rule", raw or {}, info)

    @model_validator(mode="after")
    def _rule_counts(self) -> ExamplesConfig:
        if self.probe is not None and not self.settings.counts_forgetting:
            counting = "|".join(name for name, kind in self.methods().items() if getattr(kind, "counts_forgetting", False))
            raise ValueError(
                f"examples.rule=probe with examples.method={self.method}: this method counts no correctness, so the probe would "
                f"cost time for nothing; set examples.rule=clear, or examples.method={counting}"
            )
        return self

    @property
    def probe(self) -> ProbeSettings | None:
        """The settings of the rule `probe`; None under other rules."""
        return self.rule_settings


class TokensConfig(MethodSection):
    """Level 2, which tokens the following blocks see. Keys beside these: the settings of the method, see `sparsity.tokens`
    (docs/methods.md, section Tokens)."""

    if TYPE_CHECKING:
        settings: TokenSettings = cast(Any, None)

    blocks: Blocks = (3, 6, 9)
    """Blocks, counted from 0, in which levels 2 and 3 select."""
    position: Literal["attention", "block"] = "attention"
    """Where in the block tokens are dropped: `attention` (between attention and MLP, as EViT) or `block` (after the MLP)."""

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.tokens import TOKENS

        return TOKENS


class ConnectionsConfig(MethodSection):
    """Level 3, which keys the following blocks see. Other keys: the settings of the method, see `sparsity.connections`
    (docs/methods.md, section Connections)."""

    if TYPE_CHECKING:
        settings: ConnectionSettings = cast(Any, None)

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.connections import CONNECTIONS

        return CONNECTIONS


class WeightsConfig(MethodSection):
    """Level 4, which weights stay. Other keys: the settings of the method, see `sparsity.weights` (docs/methods.md, section Weights)."""

    if TYPE_CHECKING:
        settings: WeightSettings = cast(Any, None)

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.weights import WEIGHTS

        return WEIGHTS


class PlanConfig(MethodSection):
    """How both keep ratios fall over the run. Other keys: the settings of the kind of schedule, see `sparsity.schedule`
    (docs/methods.md, section Schedule)."""

    if TYPE_CHECKING:
        settings: PlanSettings = cast(Any, None)

    method: str = "constant"
    """Kind of schedule: how the keep ratios come down over the run."""

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.schedule import PLANS

        return PLANS
