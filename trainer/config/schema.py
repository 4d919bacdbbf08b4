"""The sections of a configuration: every setting, its default, its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from sparsity.settings import ConnectionSettings, Settings, TokenSettings
from trainer.config.method_section import MethodSection
from trainer.config.values import Blocks, Chance, Duration, Epochs, Length, Section, Share

if TYPE_CHECKING:
    from sparsity.examples.curriculum import ExampleSettings
    from sparsity.schedule import PlanSettings


class ModelConfig(Section):
    """Which network. `name` is a timm VisionTransformer; `args` goes to `timm.create_model` as it is."""

    name: str
    classes: int = Field(default=1000, ge=2)
    image_size: int = Field(default=224, ge=8)
    init: str = "random"  # "random", "timm" (pretrained weights by name), or the path of a weights file
    drop_path: Chance = 0.0
    args: dict[str, Any] = Field(default_factory=dict)


class DataConfig(Section):
    """Where the shards are and how a global batch is made of them (see `trainer.data.order`)."""

    train: str  # path, glob, brace pattern or URL pattern, as webdataset users write it
    validation: str
    batch: int = Field(default=1024, ge=2)  # global and fixed, whatever the number of processes
    micro_batch: int = Field(default=128, ge=1)  # the most a device computes at once; accumulation follows
    workers: int = Field(default=4, ge=0)  # decoding processes per rank
    lanes: int = Field(default=16, ge=1)
    window: int = Field(default=4096, ge=1)  # examples permuted together inside a lane
    homes: int = Field(default=1, ge=1)
    repeats: int = Field(default=1, ge=1)  # repeated augmentation: copies of an image in one batch
    labels: str = "cls"  # "cls", "json:FIELD", "key", or "file:PATH"
    broken_share: Share = 0.001  # broken images / images of the data set above which the run stops
    verify: Literal["fast", "full"] = "fast"  # how shards are held against the index at the start
    index: str | None = None  # folder of the indexes; None: beside the shards, of remote shards ~/.cache/trilevel/index
    cache: str | None = None  # folder on a disk of the node to read all shards through; None: remote ones, ~/.cache/trilevel
    cache_size: float = Field(default=64.0, gt=0)  # GiB that the shards in the cache take together

    @model_validator(mode="before")
    @classmethod
    def _without_grant(cls, raw: Any) -> Any:
        """Files of earlier versions hold allow_pipe: it never counts, see `pipes`."""
        return {key: value for key, value in raw.items() if key != "allow_pipe"} if isinstance(raw, dict) else raw


class AugmentConfig(Section):
    """Training augmentation in timm's terms; evaluation is always timm's evaluation transform."""

    crop: Literal["rrc", "src", "shift", "none"] = "rrc"  # random resized, simple random (pad + crop), small shifts
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift: int = Field(default=0, ge=0)  # pixels, crop: shift
    flip: Chance = 0.5
    color_jitter: float = Field(default=0.0, ge=0.0)
    policy: str = "none"  # "none", "three_augment", or timm's text form, e.g. "rand-m9-mstd0.5-inc1"
    erasing: Chance = 0.0  # probability, pixel mode
    mixup: float = Field(default=0.0, ge=0.0)
    cutmix: float = Field(default=0.0, ge=0.0)
    mix_probability: Chance = 1.0
    mix_switch: Chance = 0.5
    smoothing: Share = 0.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class EvaluateConfig(Section):
    every: Length = Duration(count=1, unit="ep")
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    batch: int = Field(default=256, ge=1)  # per device


class OptimConfig(Section):
    """Optimizer by timm's name, learning rate by progress. `lr` is what is used: nothing is scaled behind your back."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0.0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    clip: float = Field(default=0.0, ge=0.0)  # global gradient norm, 0 = no clipping
    loss: Literal["soft", "bce"] = "soft"
    warmup: Epochs = 5.0
    warmup_lr: float = Field(default=1e-6, ge=0.0)
    min_lr: float = Field(default=1e-5, ge=0.0)
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)  # decay per step
    fused: bool = False  # one kernel per step where the optimizer has one (torch's AdamW, Adam, SGD, Adagrad)
    max_skipped: int = Field(default=20, ge=0)  # steps of a run without a finite gradient that are skipped; one more stops it
    max_skipped_in_row: int = Field(default=4, ge=0)  # the same, of steps that follow one another


class ExamplesConfig(MethodSection):
    """Level 1, which examples an epoch shows. Keys beside these: the settings of the method, see `sparsity.examples`
    (docs/methods.md, section Examples)."""

    if TYPE_CHECKING:
        settings: ExampleSettings = cast(Any, None)

    # whether a mixed image was right, see `Objective.credit`
    rule: Literal["clear", "without_partner", "dominant", "authors"] = "clear"

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.examples import EXAMPLES  # it imports torch, which reading a journal does not need

        return EXAMPLES


class TokensConfig(MethodSection):
    """Level 2, which tokens the following blocks see. Keys beside these: the settings of the method, see `sparsity.tokens`
    (docs/methods.md, section Tokens)."""

    if TYPE_CHECKING:
        settings: TokenSettings = cast(Any, None)

    blocks: Blocks = (3, 6, 9)  # where levels 2 and 3 select
    position: Literal["attention", "block"] = "attention"

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


class PlanConfig(MethodSection):
    """How both keep ratios come down over the run. Other keys: the settings of the kind of schedule, see `sparsity.schedule`
    (docs/methods.md, section Schedule)."""

    if TYPE_CHECKING:
        settings: PlanSettings = cast(Any, None)

    method: str = "constant"

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        from sparsity.schedule import PLANS

        return PLANS


class EngineConfig(Section):
    """How a step is computed: DeepSpeed through accelerate, or plain DDP as a control."""

    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 1
    precision: Literal["autocast", "bf16", "float32"] = "autocast"  # autocast: bf16 compute, float32 parameters
    checkpointing: bool = False  # gradient checkpointing
    compile: bool = False
    deepspeed: str | None = None  # a ds_config.json: what it says beside our own settings goes to DeepSpeed as it is


class CheckpointConfig(Section):
    every: Length = Duration(count=1, unit="ep")
    keep: int = Field(default=2, ge=1)  # newest checkpoints kept
    keep_every: Length = Duration(count=0, unit="ep")  # beside them the first one at or behind each multiple of this; 0 = none
    best: bool = True  # keep the best one too
    asynchronous: bool = True  # write in the background: training waits for the copy into memory, not for the disk


class TrackingConfig(Section):
    to: Literal["mlflow", "journal"] = "mlflow"
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite at RUNS/mlflow.db
    experiment: str = "trilevel"
    weights: bool = False  # send weights.safetensors at the end of an attempt too
    parent: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # runs of a sweep hang below this one
    tags: dict[str, str] = Field(default_factory=dict)


class TraceConfig(Section):
    """Profiling on demand, see `trainer.telemetry.profiler`."""

    steps: tuple[int, int] | None = None  # first and last step of the trace, counted from 1 as in the journal; null = none
    ranks: tuple[int, ...] = (0,)
    memory: bool = False  # record what is allocated, too

    @model_validator(mode="after")
    def _in_order(self) -> TraceConfig:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                f"trace.steps={list(self.steps)}: give the first and the last step, counted from 1, e.g. [100, 105]"
            )
        return self
