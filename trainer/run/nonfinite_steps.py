"""Steps that were skipped because their loss or gradient is not finite: the journal line, the message, the limit.

`Engine.step` decides whether a step is skipped, the same on all ranks. This module reports which batch it was and how many there
were, and ends the run with a remedy when there are too many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.state import TrainState
from trainer.config.schema import OptimConfig
from trainer.engine.delayed import Delayed
from trainer.engine.errors import EngineError

LISTED = 8  # steps listed in the error message


class Outcomes:
    """Which steps were not taken, for a host that does not wait for them: on a GPU it learns of a step two steps later."""

    def __init__(self, device: torch.device) -> None:
        self._delayed = Delayed(device)

    def add(self, taken: bool | Tensor, before: TrainState) -> list[TrainState]:
        """The outcome of the step that followed `before` (`Engine.step`). The states before the steps that are now known to have been
        skipped, oldest first, the same on all ranks."""
        return _skipped(self._delayed.add(taken, before))

    def flush(self) -> list[TrainState]:
        """The same of all steps whose outcome is not known yet; waits for the device."""
        return _skipped(self._delayed.flush())


def _skipped(known: list[tuple[float, TrainState]]) -> list[TrainState]:
    return [before for taken, before in known if not taken]


def in_row(steps: list[int]) -> int:
    """Length of the run of consecutive numbers at the end of the list."""
    return next((n for n in range(1, len(steps)) if steps[-n] - steps[-n - 1] != 1), len(steps))


def journal_line(epoch: int, batch: int, digest: str, steps: list[int]) -> dict[str, Any]:
    """The journal line for the newest of the skipped `steps`: batch `batch` of `epoch`, with its digest."""
    return {"epoch": epoch, "batch": batch, "step": steps[-1], "digest": digest, "skipped": len(steps), "in_row": in_row(steps)}


def describe(line: dict[str, Any], run: Path) -> str:
    return (
        f"step {line['step']} skipped: loss or gradient is not finite, weights and optimizer are unchanged (batch {line['batch']} of "
        f"epoch {line['epoch']}, digest {line['digest']}; {line['skipped']} skipped so far, {line['in_row']} in a row); "
        f"to see the batch: trilevel replay {run} --step {line['step']}"
    )


def refuse_too_many(steps: list[int], settings: OptimConfig, run: Path) -> None:
    """Raises EngineError past `optim.max_skipped_in_row` or `optim.max_skipped`."""
    for key, count in (("max_skipped_in_row", in_row(steps)), ("max_skipped", len(steps))):
        if count > (limit := getattr(settings, key)):
            raise EngineError(
                f"{count} steps{' in a row' * key.endswith('row')} had a non-finite loss or gradient, more than "
                f"optim.{key}={limit}: steps {', '.join(map(str, steps[-LISTED:]))}. Inspect a batch (trilevel replay {run} --step "
                f"{steps[-1]}), lower optim.lr, set optim.clip, or use engine.precision=float32; --resume continues from the last "
                "checkpoint, whose weights are finite"
            )
