"""What ends an attempt early, on all ranks: an exception, or a collective that does not complete. Finds the cause and has it written."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.engine.engine import Engine
from trainer.engine.errors import LATE
from trainer.engine.heartbeat import REPORTING
from trainer.run.directory import how_to_continue, log_stacks
from trainer.storage.exit_code import write_exit_code
from trainer.storage.standard_streams import say

# the words of gloo and NCCL where another process has ended
_PEER_GONE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process (has )?(exited|terminated)|Application timeout", re.I
)


class Failures:
    """Finds the cause of a failure and has it written. directory: of the run; end: writes a reason as the attempt's last line in the main
    thread; end_late: the same in the thread of the watch, while the main thread is blocked in a library."""

    def __init__(
        self, engine: Engine, directory: Path, attempt: int, end: Callable[[str], object], end_late: Callable[[str], object]
    ) -> None:
        self._engine, self._directory, self._attempt = engine, directory, attempt
        self._end, self._end_late = end, end_late
        self._failing = threading.Lock()  # of the first thread that records the failure
        engine.heartbeat.on_late = self._late

    @contextlib.contextmanager
    def recorded(self, step: Callable[[], int]) -> Iterator[None]:
        """Around the loop: writes an exception to this rank's log and as the attempt's last line, then re-raises it. The line begins with
        the cause of the rank that failed first: the others fail because its connections close. step: of the run, now."""
        try:
            yield
        except BaseException as error:
            if not self._failing.acquire(blocking=False):
                time.sleep(REPORTING)  # the watch of collectives is reporting, then it ends this process
            logging.getLogger("trilevel").error("failed at step %d", step(), exc_info=error)
            own = f"{type(error).__name__}: {error}"
            own = f"rank {self._engine.rank}: {own}" if self._engine.world > 1 else own
            first = self._first(error, own)
            self._engine.heartbeat.stop()
            if self._engine.is_main and first != own:
                logs = self._directory / "logs"
                say(f"trilevel: {first}\n  The run failed there first; the logs of all ranks: {logs}", error=True)
            with contextlib.suppress(Exception):
                self._end(first if first == own else f"{first}; then {own}")
            if self._engine.is_main:  # below the traceback, whose last line is the cause
                error.add_note(how_to_continue(self._directory, self._engine.world))
            raise

    def _first(self, error: BaseException, own: str) -> str:
        """The cause of the rank that failed first. A rank that was killed has left none: then those whose connections it closed name it."""
        gone = ""
        if _PEER_GONE.search(str(error)) and not self._engine.first_failure("", self._attempt):
            gone = self._engine.heartbeat.gone()
        return self._engine.first_failure(gone or own, self._attempt)

    def _late(self, text: str) -> None:
        """A collective does not complete, see `heartbeat`: writes the stacks to this rank's log and the last line of the attempt. In the
        thread of the watch; the main thread is blocked, and the process ends after this."""
        if not self._failing.acquire(blocking=False):
            return time.sleep(REPORTING)  # the main thread has raised and ends this process
        log_stacks(text)
        own = f"rank {self._engine.rank}: {text}"
        first = self._engine.first_failure(own, self._attempt)
        if first == own or self._engine.is_main:
            say(f"trilevel: {first}", error=True)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(REPORTING / 2)  # let the checkpoint in progress reach the disk
        with contextlib.suppress(Exception):
            self._end_late(first)
        return write_exit_code(LATE)
