"""Sections of a configuration for how a run is computed, saved, tracked and profiled. Most may change at a resume."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from trainer.config.credentials import no_credential
from trainer.config.values import Duration, Length, Section


class EngineConfig(Section):
    """How a step is computed: DeepSpeed through accelerate, or plain DDP for comparison."""

    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    """`deepspeed` (through accelerate) or `ddp` (plain DistributedDataParallel, as a reference)."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 cuts optimizer state over ranks, 2 gradients too, 3 parameters too. Raise it when memory runs out."""
    precision: Literal["autocast", "bf16", "float32"] = "autocast"
    """`autocast`: bf16 compute, float32 parameters; `bf16`: bf16 parameters with float32 master weights; `float32`."""
    attention: Literal["auto", "torch", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the attention. `auto`: on a GPU the fastest at each token count, measured at the start and written to the journal;
    `torch`: torch's own choice; else this one wherever it takes the input."""
    residual: Literal["float32", "bf16"] = "float32"
    """With precision autocast, the tokens between blocks in `bf16`: about a tenth fewer bytes in a step, and up to 1.5 times the rounding
    error of timm's autocast. VisionTransformers only."""
    checkpointing: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass. Less memory, about a third slower."""
    compile: bool = False
    """torch.compile; one graph per plan, shared by plans that keep as many tokens and keys. Not with ZeRO 3."""
    autotune: bool = False
    """With engine.compile: measure several kernels for each matrix product and keep the fastest (torch's max-autotune without CUDA graphs).
    Compiling takes minutes longer per graph."""
    cuda_graphs: bool = False
    """With engine.compile, kind ddp, one process and one micro-batch per step: launch the network's kernels as CUDA graphs (torch's
    reduce-overhead). For few images per step, where the host can't launch as fast as the GPU computes. No GPU has run it yet."""
    deepspeed: str | None = None
    """Path of a ds_config.json. Keys that we do not set go to DeepSpeed as they are; conflicts are refused with both values."""
    timeout: float = Field(default=600.0, ge=0, allow_inf_nan=False)
    """Seconds that a rank waits for the others before the run ends, with the late ranks and their places; 0 = without limit."""
    start_timeout: float = Field(default=1800.0, ge=0, allow_inf_nan=False)
    """The same until the first step is complete: the other ranks still import, hash shards, make the process group or compile; 0 = without
    limit."""


class CheckpointConfig(Section):
    every: Length = Duration(count=1, unit="ep")
    """Distance between checkpoints, e.g. 1ep or 500step; 0ep = at the end only."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that stay."""
    keep_every: Length = Duration(count=0, unit="ep")
    """Beside them, keep the first checkpoint at or after each multiple of this; 0ep = none."""
    best: bool = True
    """Keep the checkpoint with the best top-1 as well."""
    asynchronous: bool = True
    """Write in the background: training waits for the copy into host memory, not for the disk. Costs that memory on rank 0."""


class TrackingConfig(Section):
    to: Literal["mlflow", "journal"] = "mlflow"
    """`mlflow`, or `journal` for no tracking server (`trilevel sync` uploads later)."""
    uri: Annotated[str | None, AfterValidator(no_credential)] = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else sqlite at RUNS/mlflow.db. Credentials belong in
    MLFLOW_TRACKING_* variables."""
    experiment: str = "trilevel"
    """MLflow experiment."""
    weights: bool = False
    """Upload weights.safetensors at the end of an attempt too."""
    parent: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the MLflow parent run; `launch sweep` sets it."""
    tags: dict[str, str] = Field(default_factory=dict)
    """MLflow tags of the run."""


class TraceConfig(Section):
    """Profiling on demand, see `trainer.telemetry.profiler`."""

    steps: tuple[int, int] | None = None
    """First and last step of a torch.profiler trace, counted from 1 as in the journal, e.g. [100, 105]. Default: none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that write a trace."""
    memory: bool = False
    """Record memory allocations too."""

    @model_validator(mode="after")
    def _in_order(self) -> TraceConfig:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                f"trace.steps={list(self.steps)}: must be the first and the last step, counted from 1, e.g. [100, 105]"
            )
        return self
