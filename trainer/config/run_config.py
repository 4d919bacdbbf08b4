"""The configuration of a run, and the checks across its sections. Sections: `schema`, `schema_levels`, `schema_run`; a YAML: `load`.

Defaults are the plain case (dense DeiT from scratch); a YAML lists only what differs. Durations have a unit ("5ep",
"500step"); schedules follow progress in epochs, so they accept only `ep`. Checked here: what depends on the file alone; what
depends on the shards, the world size or the model is checked by `trainer.preflight`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.errors import did_you_mean
from trainer.config.schema import AugmentConfig, DataConfig, EvaluateConfig, ModelConfig, OptimConfig
from trainer.config.schema_levels import ConnectionsConfig, ExamplesConfig, PlanConfig, TokensConfig, WeightsConfig
from trainer.config.schema_run import CheckpointConfig, EngineConfig, TraceConfig, TrackingConfig
from trainer.config.schema_teacher import TeacherConfig
from trainer.config.values import Duration, Length, Section, Share

# Optimizers (timm's names) that update each weight by itself, so that ZeRO's flat partitions change nothing. Not cadamw and clion, which
# divide by a mean over the parameter, nor adagrad, whose state torch makes before DeepSpeed has its partitions.
ELEMENTWISE = frozenset(
    "adam adamw nadam nadamw radam radamw sgd momentum nesterov rmsprop rmsproptf adamax adadelta adabelief lion "
    "adopt adoptw".split()
)


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is RUNS/NAME."""
    runs: str = "runs"
    """Folder of run directories."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order and augmentation. Nothing depends on the number of processes or workers."""
    epochs: int = Field(default=300, gt=0)
    """Length of the schedule in epochs."""
    stop_at: Length | None = None
    """Stop there with a checkpoint, as if preempted; schedules stay those of `epochs`. For dry runs and shared studies.
    Default: none."""
    log_every: Length = Duration(count=20, unit="step")
    """Distance between log lines, e.g. 20step; 0step = before evaluations and checkpoints only. Each one synchronises the device once."""
    control: Share = 0.005
    """Share of the training time spent on timing dense passes beside the run's own, for the certified speedup; 0 = none."""
    compat: Literal["none", "authors"] = "none"
    """`authors`: attention, token order and masks as in the Tri-Level reference code (its correctness rule:
    examples.rule=authors)."""
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    examples: ExamplesConfig = Field(default_factory=ExamplesConfig)
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    connections: ConnectionsConfig = Field(default_factory=ConnectionsConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    teacher: TeacherConfig = TeacherConfig()
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    trace: TraceConfig = TraceConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        d, o = self.data, self.optim
        if d.batch % (d.lanes * d.repeats):
            raise ValueError(
                f"data.batch={d.batch}: must be a multiple of data.lanes x data.repeats = {d.lanes} x {d.repeats}, because "
                "a global batch takes the same number of images from every lane"
            )
        if d.batch % 2 or d.micro_batch % 2:
            raise ValueError(
                f"data.batch={d.batch}, data.micro_batch={d.micro_batch}: both must be even (mixup pairs neighbours)"
            )
        if self.augment.shift >= self.model.image_size:
            raise ValueError(f"augment.shift={self.augment.shift}: must be < model.image_size={self.model.image_size}")
        if o.warmup >= self.epochs:
            raise ValueError(f"optim.warmup={o.warmup:g}ep: must be < epochs={self.epochs}")
        self._decoding_fits_the_augmentation()
        self._levels_fit_the_plan()
        self._probe_fits_the_tokens()
        self.weights.settings.refuse_epochs(self.epochs)
        if self.teacher.tokens > 0 and not self.tokens.blocks:
            raise ValueError(
                f"teacher.tokens={self.teacher.tokens:g} with tokens.blocks=[]: the importance of tokens is that of the first of these "
                "blocks; name it, e.g. tokens.blocks=[2]"
            )
        e = self.engine
        if e.kind == "deepspeed" and e.zero > 0 and o.name.lower().removeprefix("fused") not in ELEMENTWISE:
            near = did_you_mean(o.name, ELEMENTWISE, cutoff=0.8)
            raise ValueError(
                f"optim.name={o.name} with engine.zero={e.zero}: ZeRO updates flat partitions of all parameters, which is equal only for "
                f"optimizers that update each weight by itself ({', '.join(sorted(ELEMENTWISE))}); {f'{near} Or ' if near else ''}set "
                "engine.zero=0"
            )
        if e.precision == "bf16" and (e.kind == "ddp" or e.zero == 0):
            raise ValueError(
                f"engine.precision=bf16 with engine.kind={e.kind}, engine.zero={e.zero}: requires DeepSpeed's ZeRO; set engine.zero=1, "
                "or engine.precision=autocast"
            )
        if e.cuda_graphs:
            for given, wrong, remedy in (
                ("engine.compile=false", not e.compile, "engine.compile=true"),
                ("engine.kind=deepspeed", e.kind == "deepspeed", "engine.kind=ddp"),
                ("engine.checkpointing=true", e.checkpointing, "engine.checkpointing=false"),
            ):
                if wrong:
                    raise ValueError(
                        f"engine.cuda_graphs=true with {given}: not supported; set {remedy}, or engine.cuda_graphs=false"
                    )
        if e.residual == "bf16" and e.precision != "autocast":
            raise ValueError(
                f"engine.residual=bf16 with engine.precision={e.precision}: only autocast has tokens and products in different precisions; "
                "set engine.precision=autocast, or engine.residual=float32"
            )
        if e.precision == "bf16" and self.weights.settings.moves_weights:
            raise ValueError(
                f"engine.precision=bf16 with weights.method={self.weights.method}: its small steps would be lost in bf16 parameters; "
                "set engine.precision=autocast"
            )
        if e.kind == "deepspeed" and e.zero == 3 and e.compile:
            raise ValueError(
                "engine.zero=3 with engine.compile=true: torch.compile cannot trace DeepSpeed's hooks on partitioned parameters; "
                "use engine.zero<=2, or compile=false"
            )
        return self

    def _decoding_fits_the_augmentation(self) -> None:
        if self.data.decode_on == "workers":
            return
        a = self.augment
        if a.crop != "rrc":
            raise ValueError(
                f"data.decode_on=device with augment.crop={a.crop}: only random resized crops are cut on the device; set "
                "data.decode_on=workers, or augment.crop=rrc"
            )
        if a.policy_on == "workers" and (a.policy != "none" or a.color_jitter > 0):
            given = f"augment.policy={a.policy}" if a.policy != "none" else f"augment.color_jitter={a.color_jitter:g}"
            raise ValueError(
                f"data.decode_on=device with {given} on the workers, which have no pixels then; set augment.policy_on=device, or "
                "data.decode_on=workers"
            )

    def _levels_fit_the_plan(self) -> None:
        plan, tokens, connections = self.plan.settings, self.tokens.settings, self.connections.settings
        if plan.ends_at is None:
            tokens.refuse_keep(tokens.final_keep)
        else:
            for name, level, end in (
                ("tokens", tokens, plan.ends_at.keep_tokens),
                ("connections", connections, plan.ends_at.keep_connections),
            ):
                if level.final_keep not in (1.0, end):
                    raise ValueError(
                        f"{name}.keep={level.final_keep} with plan.method={self.plan.method}, which ends at {end}; "
                        f"remove {name}.keep, or change the plan"
                    )
        off = "tokens.method=all" if tokens.off else tokens.fixed_by
        if off and plan.draws:
            raise ValueError(f"plan.method={self.plan.method} with {off}: its densities have no effect; set tokens.method=topk")
        if off and any(density < 1 for density in self.evaluate.densities):
            raise ValueError(
                f"evaluate.densities={list(self.evaluate.densities)} with {off}: every density computes the same tokens; set "
                "tokens.method=topk, or remove evaluate.densities"
            )
        if self.engine.compile and plan.every_step_differs:
            raise ValueError(f"engine.compile=true with {plan.every_step_differs}")

    def _probe_fits_the_tokens(self) -> None:
        probe, tokens = self.examples.probe, self.tokens.settings
        if probe is not None and probe.probe_keep < 1.0 and (tokens.off or tokens.fixed_by):
            fixed = tokens.fixed_by or f"tokens.method={self.tokens.method}"
            raise ValueError(
                f"examples.probe_keep={probe.probe_keep:g} with {fixed}, which computes the same tokens at any keep ratio; "
                "set examples.probe_keep=1"
            )

    def directory(self) -> Path:
        return Path(self.runs) / self.name

    def changed(self, **settings: Any) -> Config:
        """A copy with other settings, not validated: `changed(epochs=3, model={"init": "random"})`; a dict changes keys of a section."""
        sections = {k: getattr(self, k).model_copy(update=v) for k, v in settings.items() if isinstance(v, dict)}
        return self.model_copy(update=settings | sections)

    def without_teacher(self) -> Config:
        """A copy that learns from the labels alone: for measurements and comparisons of the network itself."""
        return self.changed(teacher=TeacherConfig())

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as plain YAML types; `Config.model_validate` of it gives an equal Config."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Hash of all settings that affect the numbers of a run: all but those that may change at a resume (`FREE_TO_CHANGE`)."""
        return hashlib.blake2b(json.dumps(_deciding(self), sort_keys=True).encode(), digest_size=16).hexdigest()


# Settings that may change at a resume: they affect where the run is computed and what is written, not its numbers.
FREE_TO_CHANGE = (
    "name", "runs", "stop_at", "log_every", "control", "tracking", "trace", "checkpoint",
    "evaluate.every", "evaluate.batch", "evaluate.densities",
    "data.train", "data.validation", "data.workers", "data.timeout", "data.micro_batch", "data.broken_share", "data.verify",
    "data.index", "data.cache", "data.cache_size", "teacher.from",
    "engine.zero", "engine.kind", "engine.checkpointing", "engine.deepspeed", "engine.timeout", "engine.start_timeout",
    "engine.autotune", "engine.attention",
    "optim.fused", "optim.max_skipped", "optim.max_skipped_in_row",
)  # fmt: skip
_FREE = tuple(f"{key}." for key in FREE_TO_CHANGE)


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and affect the numbers: {key: (ours, theirs)}; empty if a resume is allowed."""
    a, b = _deciding(ours), _deciding(theirs)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _deciding(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat(config.resolved()).items() if not f"{key}.".startswith(_FREE)}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty section is kept."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return leaves
