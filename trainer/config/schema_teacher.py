"""The section `teacher`: frozen weights whose output the network learns from, beside the labels."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainer.config.schema import refuse_loading
from trainer.config.values import Section

LOGITS = ("tau", "alpha")  # the keys of each kind of `logits` that uses them, see `_has_effect`


class TeacherConfig(Section):
    """Frozen weights that the network learns from, beside the labels (docs/methods.md, section Distillation). The teacher sees the same
    augmented and mixed images, keeps every token, is computed in the run's precision, and is in no checkpoint: only its hash is, and a
    resume with other weights is refused. `from` may change at a resume, to where the same weights are."""

    source: str = Field(default="none", alias="from")
    """Weights of the teacher: `none`, the directory of a run, the path of a weights file, or `timm` (pretrained weights by name,
    downloaded)."""
    name: str | None = None
    """timm name of the teacher's network. Default: that of the run in `from`, else model.name."""
    args: dict[str, Any] | None = None
    """Arguments of `timm.create_model` for it, written like model.args. Default: those of the network that `name` defaults to; none if
    `name` is given."""
    tokens: float = Field(default=0.0, ge=0.0)
    """Weight of token distillation: KL of the teacher's last [CLS] attention from the importance of tokens in the first block of
    tokens.blocks (SaiT). 0 = off; SaiT 1."""
    logits: Literal["none", "soft", "hard"] = "none"
    """Distillation of logits (DeiT): `soft` (KL between softened outputs) or `hard` (cross-entropy with the teacher's prediction). A
    model with a distillation token learns it from that token's head."""
    tau: float = Field(default=1.0, gt=0.0)
    """Temperature of `logits: soft`, which divides both logits. DeiT's code 1, its paper 3."""
    alpha: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of distillation in the loss of logits; the labels have the rest. DeiT's code .5."""

    @property
    def on(self) -> bool:
        return self.source != "none"

    @model_validator(mode="after")
    def _has_effect(self) -> TeacherConfig:
        """Raises ValueError for a teacher without a loss, a loss without a teacher, and settings without effect."""
        given = {
            "tokens": self.tokens > 0,
            "logits": self.logits != "none",
            "name": self.name is not None,
            "args": self.args is not None,
        }
        for key, value in given.items():
            if value and not self.on:
                raise ValueError(
                    f"teacher.{key}={getattr(self, key)!r} with teacher.from=none: there is no teacher; set teacher.from to the directory "
                    f"of a run, a weights file or timm, or remove teacher.{key}"
                )
        if self.on and not (given["tokens"] or given["logits"]):
            raise ValueError(
                f"teacher.from={self.source}: no loss uses this teacher; set teacher.tokens=1, teacher.logits=soft or hard, or remove it"
            )
        uses = {"none": (), "soft": ("tau", "alpha"), "hard": ("alpha",)}[self.logits]
        for key in LOGITS:
            if key not in uses and (value := getattr(self, key)) != type(self).model_fields[key].default:
                kinds = "soft" if key == "tau" else "soft or hard"
                raise ValueError(
                    f"teacher.{key}={value:g} with teacher.logits={self.logits} has no effect; set teacher.logits={kinds}, or remove it"
                )
        refuse_loading(self.args or {}, "teacher")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = as_usual(self)
        return {"from": own.pop("source")} | own
