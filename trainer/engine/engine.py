"""The engine: DeepSpeed through accelerate, or plain DDP for comparison. This package is the only importer of both libraries.

It gives the rest of the trainer rank, world size, device, collectives and the optimizer step. Its loss is already
sum(weight x loss) / sum of weights over the *global* batch, so gradients depend neither on accumulation nor on the number of
processes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsity.attention_kernel import TORCHS_CHOICE, AttentionShape, Kernels, using
from trainer.config.errors import ConfigError
from trainer.config.schema_run import EngineConfig
from trainer.data.keyed_hash import hashed
from trainer.data.order import BatchSplit
from trainer.engine import accelerate_start, cuda_graphs
from trainer.engine.attention_backend import facts, fastest, kept, measured
from trainer.engine.deepspeed_config import deepspeed_config, fit_buckets
from trainer.engine.deepspeed_import import import_deepspeed
from trainer.engine.environment import rank, set_single_process_env, start_alone, use_persistent_compile_cache, world_size
from trainer.engine.full_state import FullState
from trainer.engine.heartbeat import Heartbeat, backstop, set_limits
from trainer.engine.left_out_steps import begin_momentum, leaves_out_on_device
from trainer.engine.processes import Processes, ddp_settings
from trainer.engine.store import meeting


class Engine(Processes):
    """One process of a run. Its creation starts the process group; `prepare` wraps the model; `close` ends the process group.
    Raises EngineError, see `accelerate_start.accelerator`."""

    attention: str | None = None  # backend of torch's attention in every network; None: of each its own, see `choose_attention`

    def __init__(self, settings: EngineConfig, batch_split: BatchSplit, clip: float = 0.0):
        self.settings, self.batch_split = settings, batch_split
        self.on_gpu = torch.cuda.is_available()
        set_single_process_env()
        heartbeat = Heartbeat(rank(), world_size(), settings.timeout, settings.start_timeout)
        if heartbeat.wanted:
            heartbeat.start(meeting(rank(), settings.start_timeout))
            atexit.register(heartbeat.stop)
        if not self.on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
        if settings.kind == "deepspeed":
            import_deepspeed()
        rendered = deepspeed_config(settings, batch_split, world_size(), clip)  # for DDP too: raises on conflicts
        self._environment = accelerate_start.variables()
        self._plugin: Any = accelerate_start.deepspeed_plugin(rendered, self.on_gpu) if settings.kind == "deepspeed" else None
        self.clip, self._behind = clip, 0  # micro-batches of this step
        if settings.kind == "deepspeed" or self.on_gpu:  # accelerate starts none for DDP on a CPU
            start_alone("nccl" if self.on_gpu else "gloo")
        heartbeat.enter("the start of the process group")
        self._accelerator = accelerate_start.accelerator(settings, self.on_gpu, self._plugin)
        super().__init__(self._accelerator.process_index, world_size(), self._accelerator.device, heartbeat)
        atexit.register(self.close)
        self.model: Any = None
        self.optimizer: Any = None
        self.compile_cache: str | None = None  # folder of compiled graphs
        self.decides_on_device = False  # whether a step is left out without the host, see `step`

    # -- one step ------------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Move the model to the device and wrap both with DeepSpeed (or DDP). The data loader is not passed to accelerate, which
        would shard it a second time, silently (accelerate#4199)."""
        if self.settings.cuda_graphs:
            cuda_graphs.refuse(self.on_gpu, self.world, self.batch_split)
        if self.settings.compile:
            around = "torch" if self.settings.attention == "auto" else self.settings.attention  # auto: chosen inside of graphs
            self.compile_cache = use_persistent_compile_cache(
                self.settings.timeout / 4, around
            )  # well before the limit of one place
            # in place, so that parameter names stay timm's
            model.compile(**({"mode": mode} if (mode := cuda_graphs.mode_of(self.settings)) else {}))
        if self.settings.kind == "deepspeed":
            if self.settings.zero == 3 and self.settings.compile:
                raise ConfigError(
                    "engine.compile=true with engine.zero=3 crashes inside DeepSpeed: set engine.zero<=2 or engine.compile=false"
                )
            fit_buckets(self._plugin.deepspeed_config, model)
            # both in one call: DeepSpeed builds its own optimizer around the parameters it owns
            self.model, wrapped = self._accelerator.prepare(model, optimizer)
            self.optimizer = wrapped.optimizer
        else:
            model.to(self.device)
            self.optimizer = optimizer
            self.model = nn.parallel.DistributedDataParallel(model, **ddp_settings()) if self.world > 1 else model
        replicated = self.settings.kind == "ddp" or self.settings.zero == 0
        self.decides_on_device = self.on_gpu and replicated and leaves_out_on_device(self.optimizer)
        if self.decides_on_device:
            begin_momentum(self.optimizer)
        set_limits(backstop(self.settings.timeout, self.settings.start_timeout))

    def choose_attention(
        self, shapes: Iterable[AttentionShape], before: Kernels = TORCHS_CHOICE, on: str = ""
    ) -> tuple[Kernels, dict[str, Any]]:
        """Collective. Attention backends by `engine.attention`; `auto` on a GPU: for each of these attentions of a micro-batch the fastest.
        before: of the attempt that is resumed; on the device that they were timed `on` (empty: unknown) they stay, as another one
        rounds otherwise, and only other kinds are timed; on another device, whose products round otherwise too, all are timed anew.
        Returns what the network uses, and the fields of the journal (see `attention_backend.facts`)."""
        chosen, shapes = self.settings.attention, list(shapes)
        self.attention = None if chosen in ("auto", "torch") else chosen
        if chosen != "auto" or not self.on_gpu or self.settings.precision == "float32" or not shapes:
            return TORCHS_CHOICE, {"attention": self.attention or "torch"}
        device = self.broadcast_object(self.device_name())  # of rank 0, as its times are for all ranks: one network
        before, warnings = kept(before, on, device)
        new = [shape for shape in shapes if shape.kind not in before]
        times = self.broadcast_object(measured(self.device, self.batch_split.micro_batch, new, torch.bfloat16)) if new else {}
        kernels = {**before, **fastest(times, new)}
        return kernels, facts(times, kernels) | ({"warnings": warnings} if warnings else {})

    @property
    def module(self) -> Any:
        """The model without its wrapper; parameters are unsharded on every rank for ZeRO 0 to 2."""
        return getattr(self.model, "module", self.model)

    def reseed(self, seed: int, step: int) -> None:
        """Seed the global generator (used by dropout; drop path is keyed by example) from the position alone, so that a resumed run
        has the same random numbers as an uninterrupted one."""
        torch.manual_seed(int(hashed(seed, step, self.rank)) >> 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; casts the first argument if parameters are bf16 ("bf16" mode, not autocast)."""
        if self.settings.precision == "bf16":
            args = (args[0].to(torch.bfloat16), *args[1:])
        if self.settings.kind == "ddp" and self.world > 1:  # DDP decides here whether backward communicates
            self.model.require_backward_grad_sync = (
                self._behind + 1 == self.batch_split.accumulation or not torch.is_grad_enabled()
            )
        cuda_graphs.begin_pass(self.settings)
        with self._autocast(), using(self.attention):
            return self.model(*args, **kwargs)

    def forward_unwrapped(self, network: nn.Module, images: Tensor, *args: Any) -> Any:
        """The output of a network in this engine's precision without DeepSpeed or DDP: no hooks, no communication."""
        if self.settings.precision == "bf16":
            images = images.to(torch.bfloat16)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "autocast")
        cuda_graphs.begin_pass(self.settings)
        with autocast, using(self.attention):
            return network(images, *args)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.kind == "ddp" and self.settings.precision == "autocast":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()  # DeepSpeed has its own

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` differentiates: this rank's part of the global mean, times the number of ranks, because both libraries average
        over ranks, but the parts of a mean must be added. Times NaN if it is infinite, because its gradient may still be finite: the norm
        in `step` then covers the loss too."""
        return loss * (1.0 + 0.0 * loss.detach()) * self.world

    def backward(self, loss: Tensor, last: bool, *, scaled: bool = False) -> None:
        """Gradients of one micro-batch; `last` closes the global batch. `loss` is this rank's part of the global mean, or it `scaled`."""
        self.heartbeat.enter("backward")
        loss = loss if scaled else self.scaled(loss)
        if self.settings.kind == "deepspeed":
            self.model.backward(loss, scale_wrt_gas=False)
            if not last:
                self.model.step()  # counts the micro-batch
        else:
            loss.backward()
            self._behind = 0 if last else self._behind + 1

    def step(self) -> bool | Tensor:
        """One optimizer step; False, on all ranks, if the gradient (or a loss) was not finite: then no weight, moment or step count
        has changed.

        Decided by the norm of the reduced gradient, which is equal on all ranks. Where the optimizer can leave the step out on the device
        (`decides_on_device`), the result is a 0-dim bool there, and the host waits for nothing. Else it reads the norm; DeepSpeed's ZeRO
        reads it in its own step.
        """
        self.heartbeat.enter("optimizer step")
        taken = self._step()
        self.heartbeat.clock.complete_step()
        return taken

    def _step(self) -> bool | Tensor:
        if self.settings.kind == "deepspeed" and self.settings.zero > 0:
            self.model.step()
            return not self.optimizer.overflow
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip) if self.clip else self._total_norm()
        if self.decides_on_device:
            taken = self._norm * 0 == 0  # finite, in two operations; `isfinite` takes four
            # as torch's GradScaler gives it: at 1 the fused kernels change nothing
            self.optimizer.found_inf = 1.0 - taken.float()
        else:
            taken = bool(self._norm.isfinite())
        if self.settings.kind == "deepspeed":  # ZeRO 0 computes no norm, and steps on non-finite gradients
            if taken is False:
                self.model.zero_grad()
                self.model.set_gradient_accumulation_boundary(False)
            self.model.step()  # not at a boundary it only counts the micro-batch
            self.model.set_gradient_accumulation_boundary(None)
            return taken
        if taken is not False:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return taken

    def _total_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def grad_norm(self) -> float:
        """Global gradient norm of the last step before clipping; a host sync, so for logging steps only."""
        if self.settings.kind == "deepspeed" and self.settings.zero > 0:
            return float(self.model.get_global_grad_norm())
        return float(self._norm)

    def device_name(self) -> str:
        """Name of the GPU or of the processor."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU ({platform.processor() or platform.machine()})"

    def release_accelerate_state(self) -> None:
        """Allow another engine in this process beside this one, which still works: resets accelerate's singletons and restores the
        environment variables that it changed. The process group stays."""
        accelerate_start.release(self._environment)

    @contextlib.contextmanager
    def released_afterwards(self) -> Iterator[None]:
        """After the block, a run with another engine may start in this process, e.g. in a notebook: DeepSpeed's variables are gone."""
        try:
            yield
        finally:
            self.release_accelerate_state()

    def close(self) -> None:
        self.heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> FullState:
        """Weights and optimizer state, unsharded and by timm's names, as in a checkpoint."""
        return FullState(getattr(self.module, "network", self.module), self.optimizer, self.rank, self.world, self.device)
