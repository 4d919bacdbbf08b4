"""The exit code of a rank, for the launcher."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from trainer.storage.local_rank import local_rank


def write_exit_code(code: int) -> None:
    """Pass this process's exit code to `launch`: torchrun turns every code above 0 into 1."""
    if path := os.environ.get("TRILEVEL_EXIT_FILE"):
        with suppress(OSError):
            Path(path).write_text(str(code))


def forget_exit_code() -> None:
    """At the start of a rank: the code of an attempt before, which torchrun's agent has started again, is not this one's."""
    if (path := os.environ.get("TRILEVEL_EXIT_FILE")) and local_rank() == 0:
        with suppress(OSError):
            Path(path).unlink()
