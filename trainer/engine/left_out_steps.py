"""Steps that the optimizer leaves out on the device, where the host does not know that the gradient was not finite."""

from __future__ import annotations

import torch


def leaves_out_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes `found_inf`, a tensor of torch's GradScaler, and at 1 leaves its step out: torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD its momentum as zeros, where it has none yet. Its first step fills memory that torch only allocates (2.15); left out,
    that step keeps what was there, and the next one takes it for momentum."""
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
