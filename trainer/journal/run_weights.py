"""The weights of a run, checked against the hash that its journal holds of them."""

from __future__ import annotations

from pathlib import Path

from trainer.config.errors import ConfigError
from trainer.journal.file import JournalError
from trainer.journal.reader import read
from trainer.storage.disk import Disk

FILE = "weights.safetensors"


def run_weights(run: Path | str, asked: str) -> Path:
    """RUN/weights.safetensors. asked: the command or key that names the run, as its user wrote it, for messages.

    Raises ConfigError where there is none, or another than the run wrote last; runs of earlier versions and those without a journal
    have no hash to compare."""
    path = Path(run) / FILE
    if not path.is_file():
        raise ConfigError(f"{asked}: no weights at {path}; a run writes them with its first checkpoint")
    try:
        recorded = [line for line in read(run) if line["kind"] == "checkpoint"]
    except JournalError:
        return path
    about = recorded[-1].get("weights") if recorded else None
    wanted = about.get("hash") if isinstance(about, dict) else None
    if wanted is not None and (found := Disk().content(path).hash) != wanted:
        raise ConfigError(
            f"{asked}: {path} has the hash {found}, the journal recorded {wanted} at step {recorded[-1].get('step')}: the file was "
            f"changed, or the run was killed while it saved. Make it again: trilevel export {run} NEW.safetensors, then give NEW"
        )
    return path
