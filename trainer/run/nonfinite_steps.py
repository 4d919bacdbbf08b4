"""Steps that were not taken because their loss or gradient is not finite: what is said of one, and where the run ends.

Which step it is decides `Engine.step`, on all ranks alike. Here is only what a person needs: which batch it was, how many there
were, and what to change when there are too many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.schema import OptimConfig
from trainer.engine.errors import EngineError

LISTED = 8  # steps written out in the message that ends a run


def in_row(steps: list[int]) -> int:
    """How many of the numbers at the end follow one another."""
    return next((n for n in range(1, len(steps)) if steps[-n] - steps[-n - 1] != 1), len(steps))


def journal_line(epoch: int, batch: int, seen: str, steps: list[int]) -> dict[str, Any]:
    """The journal's line of the last of the skipped `steps`: batch `batch` of `epoch`, whose digest is `seen`."""
    return {"epoch": epoch, "batch": batch, "step": steps[-1], "seen": seen, "skipped": len(steps), "in_row": in_row(steps)}


def describe(line: dict[str, Any], run: Path) -> str:
    return (
        f"step {line['step']} skipped: its loss or its gradient is not finite, so nothing moved (batch {line['batch']} of epoch "
        f"{line['epoch']}, seen {line['seen']}; {line['skipped']} skipped so far, {line['in_row']} in a row); "
        f"trilevel replay {run} --step {line['step']} shows it"
    )


def refuse_too_many(steps: list[int], settings: OptimConfig, run: Path) -> None:
    """Raises EngineError past `optim.max_skipped_in_row` or `optim.max_skipped`."""
    for key, count in (("max_skipped_in_row", in_row(steps)), ("max_skipped", len(steps))):
        if count > (limit := getattr(settings, key)):
            raise EngineError(
                f"{count} steps{' in a row' * key.endswith('row')} had a loss or a gradient that is not finite, more than "
                f"optim.{key}={limit}: steps {', '.join(map(str, steps[-LISTED:]))}. Look at a batch (trilevel replay {run} --step "
                f"{steps[-1]}), lower optim.lr, set optim.clip, or use engine.precision=float32; a resume goes on from the last "
                "checkpoint, whose weights are finite"
            )
