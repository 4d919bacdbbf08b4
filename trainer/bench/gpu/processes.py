"""Child processes of `make gpu`: each in a group of its own and killed with its parent, so that none is left on the GPU when a part is
interrupted, or when `make gpu` is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Facts = dict[str, Any]
PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be imported


def one(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Facts:
    """Run a command; of a failing one its exit code and the end of its output."""
    with started(command, environment, folder) as (process, output):
        process.wait()
        return result_of(process, output)


def all_of(commands: Sequence[Sequence[str]], names: Sequence[str], environment: Mapping[str, str], at_once: int) -> Facts:
    """Run the commands, `at_once` at a time: {name: seconds}, `ok`, and of the first that failed what `one` returns."""
    waiting = list(zip(names, commands, strict=True))
    facts: Facts = {"ok": True}
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                name, command = waiting.pop(0)
                running[name] = (*stack.enter_context(started(command, environment)), time.perf_counter())
            time.sleep(0.05)
            for name, (process, output, since) in list(running.items()):
                if process.poll() is None:
                    continue
                facts[name] = time.perf_counter() - since
                if facts["ok"]:
                    facts |= result_of(process, output)
                del running[name]
    return facts


def shown(command: Sequence[str], environment: Mapping[str, str], limit: float) -> int:
    """Exit code of a command that writes to this process's output; killed after `limit` seconds (0: none), with its process group."""
    with _group(command, environment, None, None) as process, contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit or None)
    return process.returncode


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process and a file of its output; what is left of its process group is killed behind the context, or with this process."""
    with tempfile.TemporaryFile() as output, _group(command, environment, folder, output) as process:
        yield process, output


@contextlib.contextmanager
def _group(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None, output: IO[bytes] | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process; it and its children are killed when the context is left before its end. output: None is this process's."""
    errors = subprocess.STDOUT if output else None
    process = subprocess.Popen(
        command, env=dict(environment), cwd=folder, stdout=output, stderr=errors, start_new_session=True, preexec_fn=_end_with_parent
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> None:
    """A killed parent runs no `finally`, and its signal does not reach a session of its own."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def result_of(process: subprocess.Popen[bytes], output: IO[bytes]) -> Facts:
    """`ok`; of a failed process its exit code and the end of its output."""
    if not process.returncode:
        return {"ok": True}
    output.seek(0)
    return {"ok": False, "error": f"exit code {process.returncode}", "trace": output.read().decode(errors="replace")[-3000:]}
