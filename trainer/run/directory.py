"""The run directory and what is written into it: configuration, source, journal, checkpoints, logs. Rank 0 writes, the others don't.

runs/NAME/{config.yaml, source.txt, journal.jsonl, checkpoints/, kept/, weights.safetensors, logs/rank-*.txt}
"""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.storage.disk import Disk
from trainer.storage.source_tree import SOURCE_ROOT

LIBRARIES = ("torch", "deepspeed", "accelerate", "timm", "webdataset", "mlflow", "numpy")


def create_run_directory(config: Config, resume: bool) -> None:
    """Make the run directory, or refuse one that exists without `resume`. Rank 0 only. Raises ConfigError."""
    directory = config.directory()
    left = [directory / "journal.jsonl", directory / "weights.safetensors", *directory.glob("checkpoints/step-*")]
    if any(path.exists() for path in left) and not resume:
        raise ConfigError(
            f"{directory} exists: go on with it by --resume, or start another run by name=SOMETHING_ELSE (nothing is overwritten)"
        )
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False))
        (directory / "source.txt").write_text(source())
        for folder in (directory, directory.parent):  # or a crash could take the whole directory, synced checkpoints and all
            Disk().sync(folder)
    except OSError as error:
        raise ConfigError(f"runs={config.runs}: {error}; make room there, or choose another place by runs=DIRECTORY") from error


def log_to(path: Path) -> None:
    """What libraries log on this rank, and the stack of a crash (a segmentation fault too), go to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)  # another node's first sight of the folder
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    faulthandler.enable(open(path, "a"))  # noqa: SIM115 (open as long as the process lives)


def source() -> str:
    """Commit and uncommitted changes of the code that runs, so that a run can be told from another."""
    home = SOURCE_ROOT
    if shutil.which("git") is None or not (home / ".git").exists():
        return "commit unknown (not a git checkout)\n"
    commit = _git(home, "rev-parse", "HEAD")
    return f"commit {commit}\n\n{_git(home, 'diff', 'HEAD')}\n"


def facts() -> dict[str, Any]:
    """What a reader needs to place a run: commit, dirty, versions, host."""
    text = source()
    return {
        "commit": text.split()[1],
        "dirty": len(text.strip().splitlines()) > 1,
        "host": platform.node(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def launcher() -> str:
    """Who started the processes, in the user's words."""
    for name, variable in (
        ("slurm", "SLURM_JOB_ID"),
        ("accelerate", "ACCELERATE_MIXED_PRECISION"),
        ("torchrun", "TORCHELASTIC_RUN_ID"),
    ):
        if variable in os.environ:
            return name
    return "none"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _git(home: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown" if words[0] == "rev-parse" else done.stdout
