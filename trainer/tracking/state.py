"""`mlflow.json`: how much of a journal is uploaded to MLflow, and to which run."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.config.credentials import without_credentials
from trainer.storage.disk import atomic_write

STATE = "mlflow.json"


LOG = "logs/tracking.txt"


class SyncResult(NamedTuple):
    """done: the whole journal is uploaded. message: where it was uploaded, or what to do."""

    done: bool
    message: str


@dataclass
class SyncState:
    """Progress of the upload: RUN/mlflow.json, replaced as a whole after every batch."""

    uri: str = ""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # finds a run that was created but not recorded here
    experiment_id: str = ""
    run_id: str = ""
    offset: int = 0  # bytes of the journal that are sent
    step: int = 0  # of the line before `offset`
    last: dict[str, int] = field(default_factory=dict)  # {metric: last step sent}
    ended: bool = False  # the end of the last attempt is sent
    refused: int = 0  # metrics that MLflow rejected
    uploaded: dict[str, list[int]] = field(default_factory=dict)  # {file: [bytes, time]}
    trouble: str = ""  # error of the last request; empty if it succeeded

    @classmethod
    def load(cls, directory: Path) -> SyncState:
        try:
            state = cls(**json.loads((directory / STATE).read_text()))
            if {name: type(value) for name, value in asdict(state).items()} != _TYPES:
                return cls()
        except (OSError, ValueError, TypeError, RecursionError):
            return cls()
        state.uri = without_credentials(state.uri)  # of a version that wrote them down
        return state

    def save(self, directory: Path) -> None:
        with atomic_write(directory / STATE) as file:
            os.fchmod(file.fileno(), 0o600)  # an error of a library may hold what it should not
            file.write(json.dumps(asdict(self)).encode())


_TYPES = {name: type(value) for name, value in asdict(SyncState()).items()}
