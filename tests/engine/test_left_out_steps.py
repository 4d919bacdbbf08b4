"""A step left out on the device changes nothing, the first one of a run included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from trainer.engine.left_out_steps import begin_momentum, leaves_out_on_device

SGD = partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, SGD, partial(SGD, nesterov=True)])
def test_a_first_step_that_is_left_out_leaves_no_trace(kind: Callable[..., Any]) -> None:
    """Was found with fused SGD: its momentum was memory that nothing had written, 7e23 in one try."""
    found = []
    for left_out in (True, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        optimizer = kind([weight], lr=0.1, fused=True)
        assert leaves_out_on_device(optimizer)
        begin_momentum(optimizer)
        rubbish = [torch.full((1000,), 1e20) for _ in range(50)]  # what freed memory may hold
        del rubbish
        for spoiled in (True, False, False):
            if spoiled and not left_out:
                continue
            weight.grad = torch.full((1000,), float("nan") if spoiled else 0.5)
            optimizer.found_inf = torch.tensor(float(spoiled))
            optimizer.step()
        found.append(weight.detach().clone())
    assert torch.equal(*found) and found[0].isfinite().all()


def test_momentum_that_is_there_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = optimizer.state[weight]["momentum_buffer"].clone()
    begin_momentum(optimizer)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], before)
