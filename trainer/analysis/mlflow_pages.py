"""Addresses of MLflow's pages for runs and for their comparison, from the files mlflow.json of run directories. Contacts no server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from trainer.config.credentials import without_credentials


class _Run(NamedTuple):
    uri: str
    experiment: str
    run_id: str


def page_of_run(directory: Path | str) -> str:
    """How to open the run in MLflow, or how to upload it."""
    run = _read(Path(directory))
    if run is None:
        return f"not in MLflow yet; to upload it: trilevel sync {directory}"
    return _open(run.uri, f"experiments/{run.experiment}/runs/{run.run_id}")


def page_of_comparison(directories: Sequence[Path | str]) -> str:
    """How to open MLflow's comparison of these runs (charts, parameters that differ); "" unless at least two are in one MLflow."""
    runs = [run for directory in directories if (run := _read(Path(directory)))]
    if len(runs) < max(2, len(directories)) or len({run.uri for run in runs}) > 1:
        return ""
    lists = [
        json.dumps(names, separators=(",", ":")) for names in ([r.run_id for r in runs], sorted({r.experiment for r in runs}))
    ]
    return _open(runs[0].uri, f"compare-runs?runs={quote(lists[0])}&experiments={quote(lists[1])}")


def _open(uri: str, page: str) -> str:
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/{page}"
    return f"mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000/#/{page}"


def _read(directory: Path) -> _Run | None:
    try:
        state = json.loads((directory / "mlflow.json").read_text())
        run = _Run(without_credentials(str(state["uri"])), str(state.get("experiment_id")), str(state["run_id"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return run if state["run_id"] else None
