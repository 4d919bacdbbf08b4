"""Links that another user put into a run directory: what a run writes never goes to a file outside of it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch.rank_logs import copy_node, copy_ranks
from sparsity.types import Selection
from tests.support.journals import lines
from tests.support.journals import write as write_journal
from trainer.analysis.comparison import page as compare_page
from trainer.analysis.comparison.groups import compare
from trainer.analysis.report import summary as report
from trainer.config.errors import TrilevelError
from trainer.config.run_config import Config
from trainer.journal.writer import Journal
from trainer.model.weights import save_weights
from trainer.provenance import kept_lists
from trainer.run import description
from trainer.run.directory import create_run_directory, log_to
from trainer.storage.private_file import private
from trainer.tracking.state import SyncState

SELECTION = Selection(np.array([255], np.uint8), 8, None, {"hash": "abc"})


def config(folder: Path) -> Config:
    about: dict[str, Any] = {
        "name": folder.name, "runs": str(folder.parent), "epochs": 10, "data": {"train": "a.tar", "validation": "b.tar"},
        "model": {"name": "vit_tiny_patch16_224", "classes": 2},
    }  # fmt: skip
    return Config.model_validate(about)


def journal(folder: Path) -> None:
    with Journal(folder) as opened:
        opened.write("message", text="x")


def environment(folder: Path) -> None:
    with open(folder / "environment.txt", "w", opener=private) as file:
        file.write(description.environment())


def described(folder: Path) -> None:
    """The other file of `description.write`; its table of costs is another test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(description, "plan_table", lambda config, model: "a table")
        description.write(folder, config(folder), SimpleNamespace())  # pyright: ignore[reportArgumentType]


WRITERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": lambda folder: create_run_directory(folder, config(folder).resolved(), resume=True),
    "source.txt": lambda folder: create_run_directory(folder, config(folder).resolved(), resume=True),
    "journal.jsonl": journal,
    "logs/rank-0.txt": lambda folder: log_to(folder / "logs" / "rank-0.txt"),
    "logs/rank-1.txt": lambda folder: copy_ranks(io.BytesIO(b"\x1e[rank 1] hello\n"), folder / "logs"),
    "logs/node1.txt": lambda folder: copy_node(io.BytesIO(b"hello\n"), "node1", folder / "logs"),
    "environment.txt": environment,
    "plan.md": described,
    "weights.safetensors": lambda folder: save_weights(folder / "weights.safetensors", {"a": torch.ones(1)}),
    "kept/abc.npz": lambda folder: kept_lists.write(folder, SELECTION),
    "mlflow.json": lambda folder: SyncState(uri="x").save(folder),
    "report.md": report.write,
    "report.png": report.write,
    "compare.html": lambda folder: compare_page.write(compare([folder]), folder),
}


@pytest.mark.parametrize("link", ["symbolic", "dangling", "fifo"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_planted_link_is_replaced_or_refused(name: str, link: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, outside = tmp_path / "runs" / "mine", tmp_path / "precious"
    place = run / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith(("report", "compare")):
        write_journal(run, lines())
    if link == "symbolic":
        outside.write_text("thesis")
    if link == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(outside)
    refused = ""
    try:
        WRITERS[name](run)
    except (TrilevelError, OSError) as error:
        refused = str(error)
    assert outside.exists() == (link == "symbolic") and (link != "symbolic" or outside.read_text() == "thesis")
    shown = refused + capfd.readouterr().err
    replaced = place.is_file() and not place.is_symlink()
    assert replaced or str(place) in shown or name.startswith(("logs/", "kept/")), shown  # a list that is there is not written
