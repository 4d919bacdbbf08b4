"""Where a rank is, and the seconds it has spent in each place since its process started: their sum is its lifetime."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from trainer.storage.process_age import since_start

START, FIRST_STEP, STEP, DATA = "start", "first step", "step", "waiting for data"
EVALUATION, CHECKPOINT, PROBE, CONTROL = "evaluation", "checkpoint", "probe of examples", "dense baseline"
# the names of the times in the journal; steps and waits up to the end of the first step, with compilation, are `first_step`
CAUSES = {
    START: "start", FIRST_STEP: "first_step", STEP: "training", DATA: "stall", EVALUATION: "evaluation", CHECKPOINT: "save",
    PROBE: "probe", CONTROL: "control",
}  # fmt: skip


class PlaceClock:
    """place: one of the above; step: the optimizer step that it belongs to; stepped: whether the first step is complete."""

    def __init__(self) -> None:
        self.place, self.step, self.stepped = START, 0, False
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._since = time.monotonic() - since_start()

    def at(self, place: str, step: int) -> None:
        """From now on this rank is in `place`."""
        self._count()
        self.place, self.step = place, step

    @contextlib.contextmanager
    def within(self, place: str, step: int) -> Iterator[None]:
        """In `place` for the block, then again where it was."""
        before = self.place, self.step
        self.at(place, step)
        try:
            yield
        finally:
            self.at(*before)

    def complete_step(self) -> None:
        """An optimizer step is complete."""
        if not self.stepped:
            self._count()
            self.stepped = True

    def spent(self) -> dict[str, float]:
        """Seconds so far by cause; their sum is the time since the process started."""
        self._count()
        return {CAUSES[place]: round(seconds, 3) for place, seconds in self._seconds.items()}

    def _count(self) -> None:
        now = time.monotonic()
        place = FIRST_STEP if self.place in (STEP, DATA) and not self.stepped else self.place
        self._seconds[place] += now - self._since
        self._since = now
