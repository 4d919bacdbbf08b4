"""The running mean and variance of batch norms: equal on all ranks after every step, and as if a skipped step had not been.

A forward pass in training mode changes them on each rank by that rank's images. Their mean over the ranks is what evaluation, the weight
average and checkpoints take, as with `--dist-bn reduce` of timm's script, but after each step: so a resume continues bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.engine.processes import Processes
from trainer.model.batch_norm import following


class RunningStatistics:
    """Of `network`, after the engine prepared it and a checkpoint was loaded. Without batch norms every method does nothing.

    alike: the ranks have equal statistics already, because batch norms are computed over all of them.
    """

    def __init__(self, network: nn.Module, ranks: Processes, alike: bool = False):
        self._ranks, self._alike = ranks, alike
        self._buffers = [buffer for norm in following(network) for buffer in norm.buffers(recurse=False)]
        self._means = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self._taken = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def after_step(self, taken: bool | Tensor) -> None:
        """Collective; taken: see `Engine.step`. A step that was not taken, because a loss or gradient was not finite, may have made them so
        too: they are undone."""
        if not self._buffers:
            return
        if taken is False:
            self.restore()
            return
        if self._ranks.world > 1 and not self._alike:
            whole = self._ranks.all_reduce_sum(torch.cat([mean.flatten() for mean in self._means])).div_(self._ranks.world)
            for mean, part in zip(self._means, whole.split([mean.numel() for mean in self._means]), strict=True):
                mean.copy_(part.view_as(mean))
        if isinstance(taken, Tensor):  # decided on the device: the host does not know
            for buffer, before in zip(self._buffers, self._taken, strict=True):
                buffer.copy_(torch.where(taken, buffer, before))
        torch._foreach_copy_(self._taken, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """As they were after the last step that was taken: for what computes beside the training, e.g. timed passes."""
        before: list[Tensor] = self._taken
        if before:
            torch._foreach_copy_(self._buffers, before)
