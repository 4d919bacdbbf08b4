"""The recipe of timm's and DeiT's training scripts, built from timm's own components: the reference of `parity`.

timm's model, `PrefetchLoader`'s normalisation, `Mixup` (unmodified), losses, `create_optimizer_v2`, `create_scheduler_v2` and
`ModelEmaV3`. Both sides yield their intermediate tensors as a sequence of `TracedTensor`s in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from trainer.config.run_config import Config
from trainer.data.augment.on_device import erase
from trainer.data.batch import Batch
from trainer.model import weights

SCHEDULE_POINTS = 2000


class TracedTensor(NamedTuple):
    """A tensor that both sides have: its kind, its name, its value."""

    what: str
    name: str
    value: Tensor


class Timm:
    """timm's side. `state`: initial weights, if they don't come from timm's initialisation."""

    def __init__(self, config: Config, batches: int, device: torch.device, state: dict[str, Tensor] | None = None):
        m, o, a = config.model, config.optim, config.augment
        self.config, self.batches = config, batches
        self.model: nn.Module = weights.build(m, config.seed).to(
            device
        )  # `timm.create_model`, with the arguments that it takes
        if state is not None:
            self.model.load_state_dict(state)
        arguments = SimpleNamespace(
            opt=o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=0.9,
            opt_eps=o.eps, opt_betas=o.betas, layer_decay=o.layer_decay,
        )  # fmt: skip
        self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(arguments), filter_bias_and_bn=True)
        scheduler, _ = create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=config.epochs, min_lr=o.min_lr, warmup_lr=o.warmup_lr,
            warmup_epochs=o.warmup, step_on_epochs=False, updates_per_epoch=batches,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        assert scheduler is not None
        self.scheduler, self.mixup = scheduler, None
        if a.mixup > 0 or a.cutmix > 0:
            self.mixup = Mixup(
                a.mixup, a.cutmix, prob=a.mix_probability, switch_prob=a.mix_switch, mode="batch",
                label_smoothing=a.smoothing, num_classes=m.classes,
            )  # fmt: skip
        # without mixing timm's script uses LabelSmoothingCrossEntropy: the same value, rounded in another order
        self.soft = SoftTargetCrossEntropy()
        self.binary = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0, reduction="none")
        self.ema = None if o.ema is None else ModelEmaV3(self.model, decay=o.ema)

    def start(self) -> Iterator[TracedTensor]:
        yield from initial(self.model, self.optimizer)
        for t in schedule_points(self.config.epochs, self.batches):
            self.scheduler.step_update(t)
            yield from rates(self.optimizer, f"of step {t}")

    def step(self, step: int, batch: Batch) -> Iterator[TracedTensor]:
        a = self.config.augment
        self.model.train()
        self.scheduler.step_update(step)
        yield from rates(self.optimizer, f"of step {step}")
        flipped = torch.where(batch.flip[:, None, None, None], batch.images.flip(-1), batch.images)
        loader: Any = [(flipped, batch.labels)]
        ((images, labels),) = PrefetchLoader(loader, mean=a.mean, std=a.std, device=batch.images.device)
        images = erase(images, batch.erase, batch.rng_keys)
        yield TracedTensor("images", "before mixing", images)
        images, targets = self._mixed(images, labels, step)
        yield TracedTensor("images", "mixed", images)
        yield TracedTensor("targets", "", targets)
        logits = self.model(images)
        yield TracedTensor("logits", "", logits)
        if self.config.optim.loss == "bce":
            loss = self.binary(logits, targets).mean(dim=-1).mean()
        else:
            loss = self.soft(logits, targets)
        yield TracedTensor("loss", "mean", loss)
        self.optimizer.zero_grad()
        loss.backward()
        yield from gradients(self.model)
        clip(self.model, self.config.optim.clip)
        self.optimizer.step()
        yield from parameters("weight", self.model)
        if self.ema is not None:
            self.ema.update(self.model)
            yield from (TracedTensor("average", name, value) for name, value in self.ema.module.state_dict().items())

    def _mixed(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """timm mixes row i with row b-1-i, we mix neighbours: reorder the rows, mix, restore the order."""
        if self.mixup is None:
            return images, mixup_target(labels, self.config.model.classes, smoothing=self.config.augment.smoothing)
        b = len(labels)
        order = torch.tensor([*range(0, b, 2), *range(b - 1, 0, -2)], device=images.device)
        with _numpy_seeded(seed_of(self.config.seed, step)):
            mixed, targets = self.mixup(images[order], labels[order])
        back = order.argsort()
        return mixed[back], targets[back]


class LegacyGenerator:
    """numpy's legacy generator, which timm uses, with the method names of the new one, which we use."""

    def __init__(self, state: np.random.RandomState):
        self.random, self.beta, self.integers = state.rand, state.beta, state.randint


def schedule_points(epochs: int, batches: int) -> list[int]:
    """Up to 2000 steps, evenly spaced over the whole run, with the first and the last."""
    last = epochs * batches - 1
    return sorted({round(t) for t in np.linspace(0, last, min(SCHEDULE_POINTS, last + 1))})


def initial(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[TracedTensor]:
    yield from parameters("initial weight", model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, (decay, scale) in sorted(groups.items()):
        yield TracedTensor("weight decay", name, torch.tensor(decay))
        yield TracedTensor("learning rate scale", name, torch.tensor(scale))
    options = {
        k: v for k, v in optimizer.param_groups[0].items() if isinstance(v, int | float | tuple) and not k.endswith("lr")
    }
    for name in sorted(options.keys() - {"weight_decay", "lr_scale"}):
        yield TracedTensor("optimizer option", name, torch.tensor(options[name], dtype=torch.float64))


def rates(optimizer: torch.optim.Optimizer, name: str) -> Iterator[TracedTensor]:
    yield TracedTensor(
        "learning rate", name, torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    )


def parameters(what: str, model: nn.Module) -> Iterator[TracedTensor]:
    return (TracedTensor(what, name, value) for name, value in model.named_parameters())


def gradients(model: nn.Module) -> Iterator[TracedTensor]:
    return (TracedTensor("gradient", name, value.grad) for name, value in model.named_parameters() if value.grad is not None)


def clip(model: nn.Module, norm: float) -> None:
    if norm:
        nn.utils.clip_grad_norm_(model.parameters(), norm)


def seed_of(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**32


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator, which timm's Mixup uses, seeded inside the block and restored after it."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
