"""The run directory and its files: configuration, source, journal, checkpoints, logs. Only rank 0 writes; each rank has its own log.

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
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

from trainer.config.errors import ConfigError
from trainer.journal.reader import FILE
from trainer.journal.writer import Journal
from trainer.storage.disk import Disk, write_text
from trainer.storage.private_file import regular
from trainer.storage.source_tree import SOURCE_ROOT
from trainer.storage.standard_streams import say

LIBRARIES = ("torch", "deepspeed", "accelerate", "timm", "webdataset", "mlflow", "numpy")

_stacks: list[TextIO] = []  # this rank's log, once it is open


def create_run_directory(directory: Path, settings: dict[str, Any], resume: bool) -> Journal:
    """Create the run directory, with its config.yaml of `settings`; without `resume`, refuse one that holds a run. Returns its journal,
    locked before anything else is written: of two runs that start at once, the second one changes no file of the first. Rank 0 only.
    Raises ConfigError, and JournalError if another process is writing the journal."""
    journal = None
    try:
        if not resume:
            _refuse_existing(directory)
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        journal = Journal(directory)
        if not resume:
            _refuse_existing(directory)  # a run that wrote its first lines and ended since the first look
        write_text(directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_text(directory / "source.txt", source())
        for folder in (directory, directory.parent):  # else a crash could lose the directory with its synced checkpoints
            Disk().sync(folder)
        return journal
    except BaseException as error:
        if journal is not None:
            journal.close()
        if not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"runs={directory.parent}: {error}; free disk space, set runs=DIRECTORY to a writable folder, or choose another name=NAME"
        ) from error


def _refuse_existing(directory: Path) -> None:
    """Raises ConfigError for a directory with lines in its journal, weights or checkpoints. An empty journal is of a start that failed."""
    journal = directory / FILE
    left = [directory / "weights.safetensors", *directory.glob("checkpoints/step-*")]
    if (journal.exists() and Disk().size(journal) != 0) or any(path.exists() for path in left):
        raise ConfigError(
            f"{directory} exists: continue it with --resume, or start a new run with name=NEW_NAME (existing runs are never overwritten)"
        )


def refuse_start(directory: Path, resume: bool) -> None:
    """Raises ConfigError where `create_run_directory` would; creates nothing."""
    if not resume:
        _refuse_existing(directory)
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions alone don't tell whether a folder takes files
    except OSError as error:
        raise ConfigError(
            f"runs={directory.parent}: cannot write to {there} ({error.strerror}); set runs=DIRECTORY to a writable folder, or choose "
            "another name=NAME"
        ) from error


def refuse_renamed(config_file: Path, directory: Path) -> None:
    """For a resume by the config.yaml of a run directory. Raises ConfigError where its settings name another directory, as they do once it
    was renamed or moved: the run would begin anew there."""
    parent = config_file.absolute().parent
    if config_file.name == "config.yaml" and (parent / FILE).exists() and parent.resolve() != directory.resolve():
        raise ConfigError(
            f"{config_file} --resume: its name and runs stand for {directory.absolute()}, but the file is in {parent} (renamed or moved?). "
            f"Continue that run with runs={parent.parent} name={parent.name} (letters, digits, '.', '_' and '-' only: rename the folder "
            "otherwise), or begin another one with name=NEW_NAME"
        )


def how_to_continue(directory: Path, world: int, stop_at: object = None) -> str:
    """What of a run that ended early is saved, and the command that continues it. stop_at: where it stopped by its configuration."""
    try:
        saved = f"saved: {directory / 'checkpoints' / (directory / 'checkpoints' / 'latest').read_text().strip()}"
    except (OSError, UnicodeDecodeError):
        saved = "no checkpoint was saved"
    words = f"{directory / 'config.yaml'} --resume{' stop_at=null' if stop_at is not None else ''}"
    command = f"trilevel train {words}" if world == 1 else f"the same command with --resume, or python -m launch local {words}"
    return f"{saved}; to continue: {command}"


def log_to(path: Path) -> None:
    """Write this rank's library logs and crash tracebacks (segmentation faults too) to `path`; without it where it can't be opened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # on another node the folder may not be visible yet
        file = open(path, "a", opener=regular)  # noqa: SIM115 (stays open until the process exits)
        handler = logging.StreamHandler(file)
    except OSError as error:
        say(
            f"{path}: {error.strerror}; library logs of this rank are not recorded; move it away before the next start",
            error=True,
        )
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    faulthandler.enable(file)
    _stacks.append(file)


def log_stacks(text: str) -> None:
    """Write the text and the stacks of all threads to this rank's log, or to standard error without one."""
    logging.getLogger("trilevel").error("%s", text)
    faulthandler.dump_traceback(_stacks[-1] if _stacks else sys.stderr, all_threads=True)


def source() -> str:
    """Commit and uncommitted changes of the running code."""
    home = SOURCE_ROOT
    if shutil.which("git") is None or not (home / ".git").exists():
        return "commit unknown (not a git checkout)\n"
    commit = _git(home, "rev-parse", "HEAD")
    return f"commit {commit}\n\n{_git(home, 'diff', 'HEAD')}\n"


def facts() -> dict[str, Any]:
    """commit, dirty, host, python, versions of libraries."""
    text = source()
    return {
        "commit": text.split()[1],
        "dirty": len(text.strip().splitlines()) > 1,
        "host": platform.node(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def launcher() -> str:
    """What started the processes: slurm, accelerate, torchrun or none."""
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
