"""`mlflow.json`: how much of a journal MLflow has, and in which run."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.storage.disk import atomic_write

STATE = "mlflow.json"


LOG = "logs/tracking.txt"


class SyncResult(NamedTuple):
    """done: MLflow has all of the journal. message: for a person, says where it went or what to do."""

    done: bool
    message: str


@dataclass
class SyncState:
    """How far the shipping is: RUN/mlflow.json, replaced as a whole after every batch."""

    uri: str = ""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # finds a run that was made but not noted
    experiment_id: str = ""
    run_id: str = ""
    offset: int = 0  # bytes of the journal that are sent
    step: int = 0  # where the line before `offset` stands
    last: dict[str, int] = field(default_factory=dict)  # {metric: last step sent}
    ended: bool = False  # the end of the last attempt is sent
    refused: int = 0  # metrics MLflow does not take
    uploaded: dict[str, list[int]] = field(default_factory=dict)  # {file: [bytes, time]}
    trouble: str = ""  # why the last request failed; empty when it did not

    @classmethod
    def load(cls, directory: Path) -> SyncState:
        try:
            return cls(**json.loads((directory / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, directory: Path) -> None:
        with atomic_write(directory / STATE) as file:
            file.write(json.dumps(asdict(self)).encode())
