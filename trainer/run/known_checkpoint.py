"""The newest checkpoint that this node knows of, in a file beside the launcher's exit file: it outlives ranks and run directory.

torchrun's agent starts failed ranks again by itself. If the run directory was renamed or its file system is not mounted by then, `--resume`
would find no checkpoint and begin the run anew.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.save_load import CheckpointError
from trainer.storage.local_rank import local_rank


def _file() -> Path | None:
    path = os.environ.get("TRILEVEL_EXIT_FILE")
    return Path(path).with_name("newest") if path else None


def note(path: Path) -> None:
    """A checkpoint was saved, or is resumed from."""
    if (file := _file()) is not None and local_rank() == 0:
        with suppress(OSError):
            file.write_text(str(path))


def refuse_to_begin_anew(folder: Path) -> None:
    """No checkpoint was found in `folder`. Raises CheckpointError where one was there before."""
    known = ""
    if (file := _file()) is not None:
        with suppress(OSError):
            known = file.read_text()
    if known:
        raise CheckpointError(
            f"{folder}: no checkpoint, but {known} was there, and --resume would begin the run anew. Bring the run directory back "
            "(renamed? file system not mounted?), then start again with --resume"
        )
