"""The configuration of a run: every setting, its default, its meaning. `configfile` reads it from a YAML.

Defaults are the plain case (dense DeiT from scratch); a YAML states only what differs. Durations carry their unit ("5ep",
"500step"); schedules follow progress in epochs, so `ep` is all they take. What can be judged from the file alone is judged
here; what needs the shards, the world or the model is judged by `check`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator


class ConfigError(ValueError):
    """A configuration that can't be run; the text names the key, the value and the way out."""


class Duration(BaseModel):
    """A length of training: `5ep` (epochs, may be fractional) or `500step` (optimizer steps)."""

    model_config = ConfigDict(frozen=True)
    count: float
    unit: Literal["ep", "step"]

    def __str__(self) -> str:
        return f"{self.count:g}{self.unit}"


def _parse_duration(value: Any) -> Any:
    if isinstance(value, Duration):
        return value
    text = str(value).strip()
    for unit in ("step", "ep"):
        number = text.removesuffix(unit)
        if number != text:
            try:
                count = float(number)
            except ValueError:
                break
            if not 0 <= count < float("inf") or (unit == "step" and count != int(count)):
                break
            return Duration(count=count, unit=unit)
    raise ValueError(f"{value!r} is no duration: write epochs as '5ep' or optimizer steps as '500step'")


def _epochs_only(value: Duration) -> float:
    if value.unit != "ep":
        raise ValueError(f"'{value}' is in steps: a schedule follows progress, write it in epochs, e.g. '5ep'")
    return value.count


_as_text = PlainSerializer(str, return_type=str)
Length = Annotated[Duration, BeforeValidator(_parse_duration), _as_text]
Epochs = Annotated[
    float,
    BeforeValidator(lambda v: _epochs_only(_parse_duration(v))),
    PlainSerializer(lambda v: f"{v:g}ep", return_type=str),
]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]  # a part that is taken away; all of it can't be
Keep = Annotated[float, Field(gt=0.0, le=1.0)]  # a part that stays; nothing can't be
Chance = Annotated[float, Field(ge=0.0, le=1.0)]


def _no_duplicates(blocks: tuple[int, ...]) -> tuple[int, ...]:
    if list(blocks) != sorted(set(blocks)) or any(b < 0 for b in blocks):
        raise ValueError(f"{list(blocks)}: blocks are counted from 0, each named once, in rising order")
    return blocks


Blocks = Annotated[tuple[int, ...], AfterValidator(_no_duplicates)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    """Which network. `name` is a timm VisionTransformer; `args` goes to `timm.create_model` as it is."""

    name: str
    classes: int = Field(default=1000, ge=2)
    image_size: int = Field(default=224, ge=8)
    init: str = "random"  # "random", "timm" (pretrained weights by name), or the path of a weights file
    drop_path: Chance = 0.0
    args: dict[str, Any] = {}


class Data(Section):
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
    allow_pipe: bool = False  # whether shards may be `pipe:COMMAND`, run in a shell


class Augment(Section):
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


class Evaluate(Section):
    every: Length = Duration(count=1, unit="ep")
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    batch: int = Field(default=256, ge=1)  # per device


class Optim(Section):
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


class Examples(Section):
    """Level 1, which examples an epoch shows (methods in `sparsity.EXAMPLES`)."""

    method: str = "all"
    removed: Share = 0.0  # share of the data set left out of an epoch (infobatch: of those below the mean loss)
    swap: Share = 0.05  # share of the data set exchanged at an update (forgetting)
    window: Epochs = 30.0
    updates: int = Field(default=5, ge=0)
    rule: Literal["dominant", "without_partner", "authors"] = "dominant"
    ties: Literal["spread", "id"] = "spread"
    balanced: bool = False  # remove the same share of every class
    anneal: Share = 0.0  # last share of the epochs that shows everything (infobatch)


class TokenReduction(Section):
    """Level 2, which tokens the following blocks see (methods in `sparsity.TOKENS`)."""

    method: str = "all"
    keep: Keep = 1.0
    blocks: Blocks = (3, 6, 9)
    position: Literal["attention", "block"] = "attention"
    fuse: bool = False  # EViT: one token carries the dropped ones
    merged: int = Field(default=0, ge=0)  # ToMe: tokens merged per block


class Connections(Section):
    """Level 3, which keys the following blocks see (methods in `sparsity.CONNECTIONS`)."""

    method: str = "all"
    keep: Keep = 1.0


class Schedule(Section):
    """How both keep ratios come down over the run (plans in `sparsity.PLANS`)."""

    method: str = "constant"
    warmup: Epochs = 10.0
    length: Epochs = 100.0
    plateaus: int = Field(
        default=8, ge=0
    )  # distinct values on the way down, each its own compiled graph; 0 = every step its own
    stairs: tuple[tuple[Epochs, Keep, Keep], ...] = ()  # staircase: (from epoch, keep tokens, keep connections)


class Engine(Section):
    """How a step is computed: DeepSpeed through accelerate, or plain DDP as a control."""

    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 1
    precision: Literal["autocast", "bf16", "float32"] = "autocast"  # autocast: bf16 compute, float32 parameters
    checkpointing: bool = False  # gradient checkpointing
    compile: bool = False


class Checkpoint(Section):
    every: Length = Duration(count=1, unit="ep")
    keep: int = Field(default=2, ge=1)  # newest checkpoints kept
    best: bool = True  # keep the best one too


class Tracking(Section):
    to: Literal["mlflow", "journal"] = "mlflow"
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite at RUNS/mlflow.db
    experiment: str = "trilevel"
    tags: dict[str, str] = {}


# Optimizers (timm's names) whose step looks at each weight alone, so that ZeRO's flat pieces change nothing.
ELEMENTWISE = frozenset(
    [
        "adam",
        "adamw",
        "nadam",
        "nadamw",
        "radam",
        "radamw",
        "sgd",
        "momentum",
        "nesterov",
        "rmsprop",
        "rmsproptf",
        "adamax",
        "adadelta",
        "adagrad",
        "adabelief",
        "lion",
        "cadamw",
        "clion",
        "adopt",
        "adoptw",
    ]
)


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs: str = "runs"
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=300, gt=0)
    stop_at: Length | None = None  # stop there with a checkpoint, as if preempted; schedules stay those of `epochs`
    log_every: Length = Duration(count=20, unit="step")
    control: Share = 0.005  # share of the training time spent on timing a dense control, see `trainer.control`; 0 = none
    compat: Literal["none", "authors"] = "none"
    model: Model
    data: Data
    augment: Augment = Augment()
    optim: Optim = Optim()
    examples: Examples = Examples()
    tokens: TokenReduction = TokenReduction()
    connections: Connections = Connections()
    plan: Schedule = Schedule()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        d, o = self.data, self.optim
        if d.batch % (d.lanes * d.repeats):
            raise ValueError(
                f"data.batch={d.batch} is not a multiple of data.lanes x data.repeats = {d.lanes} x {d.repeats}: "
                "a global batch takes the same number of images from every lane"
            )
        if d.batch % 2 or d.micro_batch % 2:
            raise ValueError(
                f"data.batch={d.batch}, data.micro_batch={d.micro_batch}: both must be even, mixup pairs neighbours"
            )
        if o.warmup >= self.epochs:
            raise ValueError(f"optim.warmup={o.warmup:g}ep does not end before epochs={self.epochs}: shorten it")
        if self.tokens.method == "tome" and self.tokens.keep == 1.0:
            raise ValueError(
                "tokens.method=tome with tokens.keep=1.0 merges nothing: give the share that stays, e.g. tokens.keep=0.7"
            )
        if self.engine.compile and self.plan.method == "cosine" and self.plan.plateaus == 0:
            raise ValueError(
                "engine.compile=true with plan.plateaus=0: every step would be a graph of its own; set plan.plateaus=8"
            )
        e = self.engine
        if e.kind == "deepspeed" and e.zero > 0 and o.name.lower().removeprefix("fused") not in ELEMENTWISE:
            raise ValueError(
                f"optim.name={o.name} with engine.zero={e.zero}: ZeRO steps flat pieces of all parameters, which is the same only for "
                f"optimizers that treat each weight alone ({', '.join(sorted(ELEMENTWISE))}); set engine.zero=0"
            )
        if e.precision == "bf16" and (e.kind == "ddp" or e.zero == 0):
            raise ValueError(
                f"engine.precision=bf16 with engine.kind={e.kind}, engine.zero={e.zero}: it needs DeepSpeed's ZeRO; set engine.zero=1, "
                "or engine.precision=autocast"
            )
        if e.kind == "deepspeed" and e.zero == 3 and (e.compile or o.ema is not None):
            raise ValueError(
                f"engine.zero=3 with engine.compile={e.compile}, optim.ema={o.ema}: neither works on parameters cut over ranks; use "
                "engine.zero<=2"
            )
        return self

    def directory(self) -> Path:
        return Path(self.runs) / self.name

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as plain YAML types; `Config.model_validate` of it gives the same run."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Hash of all that decides the numbers of a run; what may change at a resume (see `FREE_TO_CHANGE`) is left out."""
        return hashlib.blake2b(
            json.dumps(_flat(self.resolved(), FREE_TO_CHANGE), sort_keys=True).encode(), digest_size=16
        ).hexdigest()


# What a resume may change without changing the run: where it is computed and what is written about it.
FREE_TO_CHANGE = (
    "name", "runs", "stop_at", "log_every", "control", "tracking", "checkpoint", "evaluate.every", "evaluate.batch",
    "data.train", "data.validation", "data.workers", "data.micro_batch", "data.broken_share", "data.verify",
    "data.index", "data.cache", "data.cache_size", "data.allow_pipe",
    "engine.zero", "engine.kind", "engine.checkpointing",
)  # fmt: skip


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that decide the numbers and differ: {key: (ours, theirs)}; empty when a resume is allowed."""
    a, b = _flat(ours.resolved(), FREE_TO_CHANGE), _flat(theirs.resolved(), FREE_TO_CHANGE)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flat(tree: dict[str, Any], without: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, less the keys (or sections) named in `without`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if key in without:
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, without, key + ".")
        else:
            flat[key] = value
    return flat
