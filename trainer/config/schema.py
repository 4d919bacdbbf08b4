"""Sections of a configuration that decide what is trained on which images: model, data, augmentation, optimizer, evaluation.

Every setting with its default and its meaning, as in `schema_levels` (what is left out) and `schema_run` (how it is computed, saved
and tracked).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.values import Chance, Duration, Epochs, Frozen, KeepRatios, Length, Section, Share

# arguments of timm.create_model that load files or wrap the network
LOADS = frozenset({"checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "no_jit", "out_indices"})


class ModelConfig(Section):
    """Which network. `name` is a classifier of timm; `args` is passed to `timm.create_model`. What works with which: docs/networks.md."""

    name: str
    """timm name, e.g. deit_small_patch16_224. A plain VisionTransformer has all four levels, others fewer, see docs/networks.md."""
    classes: int = Field(default=1000, ge=2)
    """Number of classes. `trilevel pack` prints it; labels outside are refused."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square input in pixels. Another size than the timm model's default changes the number of tokens."""
    init: str = "random"
    """Starting weights: `random`, `timm` (pretrained weights by name, downloaded), the path of a weights file, or the directory of a run
    (its weights.safetensors). Another number of classes gives a new head, another image size a resized position embedding."""
    drop_path: Share = 0.0
    """Stochastic depth rate of the last block; earlier blocks rise linearly from 0. Larger models want more (DeiT-B .1)."""
    sync_batchnorm: bool = False
    """Compute batch norms over the micro-batches of all processes, so that without gradient accumulation results do not depend on how many
    there are. For networks with batch norms (ResNet, EfficientNet, ...); each costs two all-reduces per forward and backward pass."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model` that build the network, e.g. {patch_size: 4, embed_dim: 96}."""

    @model_validator(mode="after")
    def _builds_only(self) -> ModelConfig:
        refuse_loading(self.args, "model")
        return self


def refuse_loading(args: dict[str, Any], section: str) -> None:
    """Raises ValueError for arguments from which timm would read pickles, at `--check` already, and for those without a value."""
    for key, value in args.items():
        if value is None:
            colon = key.partition(":")
            meant = f"; write {{{colon[0]}: {colon[2]}}}, with a blank behind the colon" if colon[1] else ""
            raise ValueError(f"{section}.args.{key}=null: timm leaves out arguments without a value; remove it{meant}")
    if wrong := sorted(key for key in args if key in LOADS or key.startswith("pretrained")):
        remedy = "model.init=FILE" if section == "model" else "teacher.from=FILE"
        raise ValueError(
            f"{section}.args.{wrong[0]}={args[wrong[0]]!r}: {section}.args only builds the network; load weights with {remedy}"
        )


class DataConfig(Section):
    """Where the shards are and how a global batch is made of them (see `trainer.data.order`)."""

    train: str
    """Training shards, as webdataset users write them: a path, a glob, a brace pattern or a URL pattern. Or a folder of class folders,
    which is read file by file (slower) and needs `trilevel index FOLDER` too."""
    validation: str
    """Validation shards, written like `data.train`."""
    batch: int = Field(default=1024, ge=2)
    """Images of one optimizer step over all processes. Fixed whatever the number of processes; a multiple of lanes x repeats,
    even."""
    micro_batch: int = Field(default=128, ge=1)
    """Most images that a device computes at once; accumulation follows. Lower it when memory runs out; results stay the same
    to rounding."""
    workers: int = Field(default=4, ge=0, le=1024)
    """Decoding processes per rank; 0 decodes in the rank itself. Raise it while `data wait` in the report is above a few
    percent."""
    decode_on: Literal["workers", "device"] = "workers"
    """Where training images are decoded, cropped and resized: `workers`, or `device`, for hosts with few cores: nvJPEG decodes baseline
    colour JPEGs, the workers the rest. Needs TorchCodec; pixels differ from those of `workers`, see docs/data.md."""
    timeout: float = Field(default=540.0, ge=0, allow_inf_nan=False)
    """Seconds to wait for a batch from a worker process before the run ends with its cause; 0 = without limit. Requests to a remote
    store are repeated for up to six minutes. Below `engine.timeout`: else the other ranks end the run first, and no worker is named."""
    lanes: int = Field(default=16, ge=1)
    """Equal ranges of the epoch's sequence; each global batch takes the same number of images from every lane. More lanes mix
    more shards into a batch and read more shards at the same time."""
    window: int = Field(default=4096, ge=1)
    """Examples of a lane that are shuffled together. Larger shuffles better and needs more shards in memory or cache at the
    same time."""
    homes: int = Field(default=1, ge=1)
    """Groups that shards are dealt into once, by seed. With one home per node, a node's cache of remote shards is reused in
    every epoch. Change it for remote shards with a bounded cache; 1 is one pool."""
    repeats: int = Field(default=1, ge=1)
    """Repeated augmentation: copies of an image in one batch. DeiT uses 3; an epoch then shows a third of the images."""
    labels: str = "cls"
    """Source of the labels: `cls` (the sample's .cls file; of class folders the folder), `json:FIELD`, `key` (n01440764/x or
    n01440764_x), or `file:PATH`."""
    broken_share: Share = 0.001
    """Broken images / images of the data set above which the run stops. Below it they get weight 0 and a line in the journal."""
    verify: Literal["fast", "full"] = "fast"
    """Check of shards against their index at the start. `fast`: names, sizes, a hash of 16 blocks, all bytes of shards with a new
    time stamp (up to 2 GiB); `full`: all bytes."""
    index: str | None = None
    """Folder of the indexes. Default: beside the shards; for remote shards ~/.cache/trilevel/index."""
    cache: str | None = None
    """Folder on a local disk of the node through which all shards are read. Default: only remote shards, in ~/.cache/trilevel.
    Set it when the shared file system is slow."""
    cache_size: float = Field(default=64.0, gt=0, le=1e9)
    """Size limit of the cache in GiB. Too small for the shards that are read at the same time: refused with the number needed."""

    @model_validator(mode="before")
    @classmethod
    def _without_grant(cls, raw: Any) -> Any:
        """Files of earlier versions have allow_pipe, which is ignored, see `pipes`."""
        return {key: value for key, value in raw.items() if key != "allow_pipe"} if isinstance(raw, dict) else raw


class AugmentConfig(Section):
    """Training augmentation in timm's terms; evaluation is always timm's evaluation transform."""

    crop: Literal["rrc", "src", "shift", "none"] = "rrc"
    """`rrc`: random resized crop; `src`: simple random crop (DeiT-III: resize, pad 4, crop); `shift`: shift by some pixels;
    `none`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random resized crop, as shares of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of a random resized crop."""
    shift: int = Field(default=0, ge=0)
    """Largest shift in pixels, for crop: shift."""
    flip: Chance = 0.5
    """Probability of a horizontal flip. 0 for digits and text."""
    color_jitter: float = Field(default=0.0, ge=0.0)
    """Strength of brightness, contrast and saturation changes (timm's color_jitter); 0 = none."""
    policy: str = "none"
    """`none`, `three_augment` (DeiT-III), or timm's text form, e.g. rand-m9-mstd0.5-inc1."""
    policy_on: Literal["workers", "device"] = "workers"
    """Where policy and colour jitter are computed: `workers`, by PIL; `device`, for a whole batch at once, with the same draws and at most
    one grey level beside PIL per operation, so that the loader needs fewer cores. AugMix only in the workers."""
    erasing: Chance = 0.0
    """Probability of random erasing, pixel mode."""
    mixup: float = Field(default=0.0, ge=0.0)
    """Alpha of mixup's Beta distribution; 0 = no mixup. It lowers the certainty of forgetting events."""
    cutmix: float = Field(default=0.0, ge=0.0)
    """Alpha of cutmix's Beta distribution; 0 = no cutmix."""
    mix_probability: Chance = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch: Chance = 0.5
    """Probability of cutmix where mixup and cutmix are both on."""
    smoothing: Share = 0.0
    """Label smoothing."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter for resizing: `bicubic` or `bilinear`."""
    mean: tuple[Chance, Chance, Chance] = (0.485, 0.456, 0.406)
    """Channel means that are subtracted, of pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations to divide by, of pixels in [0, 1]."""

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        (small, large), (narrow, wide) = self.scale, self.ratio
        if not 0 < small <= large <= 1:
            raise ValueError(f"augment.scale=[{small:g}, {large:g}]: two shares of the image in (0, 1], the smaller one first")
        if not 0 < narrow <= wide:
            raise ValueError(f"augment.ratio=[{narrow:g}, {wide:g}]: two aspect ratios above 0, the smaller one first")
        if min(self.std) <= 0:
            raise ValueError(f"augment.std={list(self.std)}: every channel must be above 0, pixels are divided by it")
        return self


class EvaluateConfig(Section):
    every: Length = Duration(count=1, unit="ep")
    """Distance between evaluations, e.g. 1ep or 500step; 0ep = at the end only."""
    densities: KeepRatios = ()
    """Keep ratios of tokens at which every evaluation scores the weights too, with all connections kept; each costs an evaluation and
    gives a line `density` in the journal and a curve in MLflow."""
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    """Share of the resized image that the central crop keeps (timm's crop_pct)."""
    batch: int = Field(default=256, ge=1)
    """Images per device in one forward pass of an evaluation. Does not change results."""


class OptimConfig(Section):
    """Optimizer by timm's name, learning rate by progress. `lr` is used unchanged: it is not scaled by the batch."""

    name: str = "adamw"
    """timm name of the optimizer, e.g. adamw, sgd, lion, fusedlamb. ZeRO 1 to 3 take those that treat each weight alone."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Highest learning rate, used as it is: not scaled by the batch. DeiT: 5e-4 x batch / 512."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term added to the denominator."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """Decoupled weight decay; biases, norms and embeddings have none (timm's rule)."""
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor of the learning rate per block from the head down; for fine-tuning, e.g. .75. Default: none."""
    freeze: Frozen = 0
    """What does not train: a number of first blocks, with the embedding in front of them, or patterns of parameter names, e.g.
    [pos_embed, "blocks.[0-5].*"]. 0 = nothing. Patterns are those of a shell, names those of timm."""
    clip: float = Field(default=0.0, ge=0.0)
    """Largest global gradient norm; 0 = no clipping."""
    loss: Literal["soft", "bce"] = "soft"
    """`soft`: cross-entropy with soft targets; `bce`: binary cross-entropy per class (DeiT-III)."""
    warmup: Epochs = 5.0
    """Epochs of linear warm-up; the cosine runs over all epochs underneath (timm's warmup_prefix=False). DeiT: 5 of 300."""
    warmup_lr: float = Field(default=1e-6, ge=0.0)
    """Learning rate at the start of the warm-up."""
    min_lr: float = Field(default=1e-5, ge=0.0)
    """Learning rate at the end of the run."""
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay per step of the exponential moving average of the weights, e.g. .9999. Default: none kept."""
    fused: bool | None = None
    """One kernel per step (torch's AdamW, Adam, SGD, Adagrad). Faster, and on a GPU no step waits for the host; not bitwise timm. Default:
    on a GPU, where the optimizer has one."""
    max_skipped: int = Field(default=20, ge=0)
    """Steps of a run without a finite gradient that are skipped; one more stops the run."""
    max_skipped_in_row: int = Field(default=4, ge=0)
    """The same for consecutive steps."""
