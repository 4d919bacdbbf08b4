"""What tests/engine/test_skipped_steps_and_ema.py starts on several processes: many engines one after the other on a small
network, facts as JSON lines.

many_engines.py TASK=MODE ...; a MODE is KIND:ZERO:PRECISION:ACCUMULATION, or with
:device to leave steps out as on a GPU, without the host. Tasks: see the functions at the end.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity import build
from sparsity.types import Plan
from sparsity.vit import SparseViT
from trainer.config import run_config
from trainer.data.order import BatchSplit, slice_of
from trainer.engine.engine import Engine
from trainer.engine.environment import world_size
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer
from trainer.run.shutdown import end_process

BATCH, CLIP, DECAY = 12, 1.0, 0.9
State = dict[str, Tensor]
Spoil = Callable[[Tensor], Tensor]
torch.set_num_threads(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))


class Run:
    """One engine over the network: `states[s]` is everything (rank 0) after s steps, `taken[s]` whether step s was taken."""

    def __init__(self, mode: str, saved: State | None = None, **optim: Any):
        kind, zero, precision, accumulation, *device = mode.split(":")
        rows = BATCH // world_size()
        self.steps = BatchSplit(rows // int(accumulation), int(accumulation), rows)
        settings = run_config.EngineConfig(
            kind=kind, zero=int(zero), precision=precision, deepspeed=os.environ.get("DEEPSPEED_FILE")
        )  # type: ignore[arg-type]
        self.engine = Engine(settings, self.steps, clip=CLIP)
        self.model = network()
        if saved is not None:
            self.model.load_state_dict(part(saved, "w:"))
        optim |= {"fused": True} if device else {}
        self.engine.prepare(self.model, build_optimizer(self.model, run_config.OptimConfig(weight_decay=0.1, **optim)))
        self.engine.decides_on_device |= bool(device)
        self.ema = Ema(self.model, DECAY)
        if saved is not None:
            self.engine.state.load(part(saved, "w:"), part(saved, "o:"))
            self.ema.load_state_dict(part(saved, "e:"))
        self.states: dict[int, State] = {}
        self.taken: dict[int, bool] = {}
        self.facts: dict[int, tuple[float, float]] = {}

    def step(self, step: int, spoil: Spoil | None = None) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 16, generator=generator)
        labels = torch.randint(0, 5, (BATCH,), generator=generator)
        first, last = slice_of(BATCH, self.engine.world, self.engine.rank)
        total = torch.zeros(())
        for begin in range(first, last, self.steps.micro_batch):
            rows = slice(begin, begin + self.steps.micro_batch)
            logits = self.engine.forward(images[rows]).float()
            losses = nn.functional.cross_entropy(logits, labels[rows], reduction="none")
            if spoil and self.engine.rank == self.engine.world - 1 and begin == first:
                losses = spoil(losses)
            self.engine.backward(losses.sum() / BATCH, rows.stop >= last)
            total += losses.detach().sum() / BATCH
        taken = self.engine.step()
        assert isinstance(taken, Tensor) == self.engine.decides_on_device
        self.ema.update(taken)
        self.taken[step] = bool(taken)
        state = self.engine.state
        kept = {"w:": state.weights(), "o:": state.optimizer_state(), "e:": self.ema.state_dict()}
        self.states[step + 1] = {prefix + name: value for prefix, of in kept.items() for name, value in of.items()}
        self.facts[step] = (float(self.engine.all_reduce_sum(total)), self.engine.grad_norm())

    def answer(self) -> Tensor:
        """Logits of a batch under the averages, then what the weights are after it."""
        self.engine.model.eval()
        with torch.no_grad(), self.ema.applied(self.model):
            found = self.engine.forward(torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(99)))
        self.engine.model.train()
        return found.float()

    def end(self) -> Run:
        self.engine.release_accelerate_state()
        return self


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def differing(one: State, other: State) -> list[str]:
    names = sorted(one.keys() ^ other.keys())
    return names + [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]


SPOILS: dict[int, Spoil] = {
    1: lambda losses: losses * math.nan,
    2: lambda losses: losses + torch.tensor([math.inf] + [0.0] * (len(losses) - 1)),  # its gradient is finite
    3: lambda losses: losses + (losses.detach() * 0 + losses - losses.detach()).mul(0).abs().sqrt(),  # only the gradient is not
}


def skipping(mode: str) -> dict[str, Any]:
    """Steps 0 .. 5, of which SPOILS are spoiled on the last rank; beside steps 0, 4, 5 alone; and resumed after step 2."""
    spoiled, clean = Run(mode), None
    for step in range(6):
        spoiled.step(step, SPOILS.get(step))
    spoiled.end()
    clean = Run(mode)
    for step in (0, 4, 5):
        clean.step(step)
    clean.end()
    saved = spoiled.engine.broadcast_object(spoiled.states[3])
    resumed = Run(mode, saved)
    for step in range(3, 6):
        resumed.step(step, SPOILS.get(step))
    resumed.end()
    return {
        "taken": [spoiled.taken[step] for step in range(6)],
        "clean": all(clean.taken.values()),
        "held": [differing(spoiled.states[1], spoiled.states[step]) for step in (2, 3, 4)],
        "after": [differing(spoiled.states[step], clean.states[step]) for step in (5, 6)],
        "resumed": differing(spoiled.states[6], resumed.states[6]),
        "finite": all(bool(value.isfinite().all()) for value in spoiled.states[6].values()),
        "names": len(spoiled.states[6]),
        "norm": spoiled.facts[1][1],
    }


def averaging(mode: str) -> dict[str, Any]:
    """Four steps with an average; its values, the answer under it, and whether the weights are as before it was applied."""
    run = Run(mode)
    for step in range(4):
        run.step(step)
    answer = run.engine.all_gather(run.answer()[None])
    after = run.engine.state.weights()
    run.step(4)
    run.end()
    saved = run.engine.broadcast_object(run.states[2])
    resumed = Run(mode, saved)
    for step in (2, 3, 4):
        resumed.step(step)
    resumed.end()
    return {
        "same_everywhere": bool((answer == answer[0]).all()),
        "answer": answer[0].flatten().tolist(),
        "average": {name: value.flatten().tolist() for name, value in part(run.states[4], "e:").items()},
        "given_back": differing(
            {"w:" + name: value for name, value in after.items()}, {k: v for k, v in run.states[4].items() if k[0] == "w"}
        ),
        "resumed": differing(run.states[5], resumed.states[5]),
        "last": run.facts[4],
    }


def tiny(**settings: Any) -> Any:
    about = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **about, **settings)


def compiling(mode: str) -> dict[str, Any]:
    """Steps under plans that come and go, compiled beside eager: graphs after each, and the losses of both."""
    kind, zero, precision, _ = mode.split(":")
    plans = [Plan(keep, keep) for keep in (1.0, 0.8, 0.6, 0.8, 1.0, 0.6)]
    losses: dict[bool, list[float]] = {False: [], True: []}
    graphs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build.build(tiny(), tokens="topk", connections="shared_keys", blocks=(0,))
        counter = CompileCounterWithBackend("aot_eager")  # no code is generated: graphs are what counts here
        model.compile = partial(SparseViT.compile, model, backend=counter)
        settings = run_config.EngineConfig(kind=kind, zero=int(zero), precision=precision, compile=compiled)  # type: ignore[arg-type]
        engine = Engine(settings, BatchSplit(4, 1, 4), CLIP)
        engine.prepare(model, build_optimizer(model, run_config.OptimConfig()))
        for step, plan in enumerate(plans):
            generator = torch.Generator().manual_seed(step + 100 * engine.rank)
            images, rng_keys = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
            logits = engine.forward(images, plan, frozenset(), rng_keys).logits.float()
            loss = nn.functional.cross_entropy(logits, torch.arange(4))
            engine.backward(loss / engine.world, last=True)
            engine.step()
            losses[compiled].append(float(engine.all_reduce_sum(loss.detach())))
            if compiled:
                graphs.append(counter.frame_count)
        engine.release_accelerate_state()
    return {"graphs": engine.all_gather_objects([graphs]), "eager": losses[False], "compiled": losses[True]}


def accumulating(mode: str) -> dict[str, Any]:
    """Gradient checkpointing, clipping and accumulation together, beside one micro-batch without checkpointing: (loss, norm) of 4 steps."""
    kind, zero, precision, accumulation = mode.split(":")
    found = {}
    for name, parts, checkpointing in (("split", int(accumulation), True), ("whole", 1, False)):
        torch.manual_seed(0)
        vit = tiny(drop_path_rate=0.3)
        vit.set_grad_checkpointing(checkpointing)
        model = build.build(vit, tokens="topk", connections="shared_keys", blocks=(0,))
        settings = run_config.EngineConfig(kind=kind, zero=int(zero), precision=precision, checkpointing=checkpointing)  # type: ignore[arg-type]
        rows = BATCH // world_size()
        engine = Engine(settings, BatchSplit(rows // parts, parts, rows), clip=0.1)
        engine.prepare(model, build_optimizer(model, run_config.OptimConfig(lr=1e-2)))
        found[name] = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            images, labels = torch.randn(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % 5
            begin, end = slice_of(BATCH, engine.world, engine.rank)
            total = torch.zeros(())
            for first in range(begin, end, rows // parts):
                part = slice(first, first + rows // parts)
                rng_keys = torch.arange(BATCH)[part] + 100 * step
                logits = engine.forward(images[part], Plan(0.7, 0.5), frozenset(), rng_keys).logits.float()
                loss = nn.functional.cross_entropy(logits, labels[part], reduction="sum") / BATCH
                engine.backward(loss, last=part.stop >= end)
                total += loss.detach()
            engine.step()
            found[name].append((float(engine.all_reduce_sum(total)), engine.grad_norm()))
        engine.release_accelerate_state()
    return found


def fusing(mode: str) -> dict[str, Any]:
    """Three steps with and without the fused kernel; and a fused run that continues from the other's state."""
    runs: dict[bool, Run] = {}
    for fused in (False, True):
        runs[fused] = Run(mode, fused=fused)
        for step in range(3):
            runs[fused].step(step)
        runs[fused].end()
    on = Run(mode, runs[True].engine.broadcast_object(runs[False].states[2]), fused=True)
    on.step(2)
    on.end()
    return {
        "fused": [group.get("fused") for group in on.engine.state._base_optimizer().param_groups],
        "names": [sorted(runs[fused].states.get(3, {})) for fused in (False, True)],
        "furthest": max(
            [
                float((runs[False].states[3][name].float() - other.states[3][name].float()).abs().max())
                for other in (runs[True], on)
                for name in other.states[3]
            ],
            default=None,  # rank 0 alone has states
        ),
    }


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def summing(mode: str) -> dict[str, Any]:
    """Gradients of three micro-batches in autocast, beside those of the same network without an engine, summed in float32 over the
    micro-batches and the ranks. In the second step, what backward passes and step read, and how often they synchronise."""
    twin = network()
    run = Run(mode)
    engine, parts, losses = run.engine, run.steps.accumulation, []
    begin, _ = slice_of(BATCH, engine.world, engine.rank)
    images, labels = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(3)), torch.arange(BATCH) % 5
    for number in range(parts):
        part = slice(begin + number * run.steps.micro_batch, begin + (number + 1) * run.steps.micro_batch)
        losses.append(partial(_loss, images[part], labels[part]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses[-1](twin)
        loss.backward()
    for number, loss in enumerate(losses):
        engine.backward(loss(engine.forward), last=number == parts - 1)
    worst = rounded = 0.0
    for parameter, other in zip(engine.module.parameters(), twin.parameters(), strict=True):
        dist.all_reduce(other.grad)
        found = (
            safe_get_full_grad(parameter) if engine.settings.kind == "deepspeed" and engine.settings.zero else parameter.grad
        )
        largest = other.grad.abs().max()
        worst = max(worst, float((found.float() - other.grad).abs().max() / largest))
        rounded = max(rounded, float((other.grad.bfloat16().float() - other.grad).abs().max() / largest))
    engine.step()
    from deepspeed.accelerator import get_accelerator

    synchronised: list[int] = []
    get_accelerator().synchronize = lambda *_: synchronised.append(1)
    kept = [loss(engine.forward) for loss in losses]
    with Reads() as reads:
        for number, loss in enumerate(kept):
            engine.backward(loss, last=number == parts - 1)
        engine.step()
    run.end()
    return {"worst": worst, "rounded": rounded, "reads": reads.count, "synchronised": len(synchronised)}


def _loss(images: Tensor, labels: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
    return nn.functional.cross_entropy(network(images).float(), labels, reduction="sum") / BATCH


TASKS = {f.__name__: f for f in (skipping, averaging, compiling, accumulating, fusing, summing)}

if __name__ == "__main__":
    for word in sys.argv[1:]:
        task, _, mode = word.partition("=")
        facts = TASKS[task](mode)
        if os.environ["RANK"] == "0":
            print(json.dumps({"name": word, **facts}), flush=True)
    end_process(0)
