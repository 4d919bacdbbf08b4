"""Child processes of `make gpu`: each in a group of its own, so that none is left on the GPU when a part is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Facts = dict[str, Any]


def one(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Facts:
    """Run a command; of a failing one its exit code and the end of its output."""
    with _started(command, environment, folder) as (process, output):
        process.wait()
        return _result(process, output)


def all_of(commands: Sequence[Sequence[str]], names: Sequence[str], environment: Mapping[str, str], at_once: int) -> Facts:
    """Run the commands, `at_once` at a time: {name: seconds}, `ok`, and of the first that failed what `one` returns."""
    waiting = list(zip(names, commands, strict=True))
    facts: Facts = {"ok": True}
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                name, command = waiting.pop(0)
                running[name] = (*stack.enter_context(_started(command, environment)), time.perf_counter())
            time.sleep(0.05)
            for name, (process, output, since) in list(running.items()):
                if process.poll() is None:
                    continue
                facts[name] = time.perf_counter() - since
                if facts["ok"]:
                    facts |= _result(process, output)
                del running[name]
    return facts


@contextlib.contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process and its output; it and its children are killed when the context is left before its end."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process, output
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _result(process: subprocess.Popen[bytes], output: IO[bytes]) -> Facts:
    if not process.returncode:
        return {"ok": True}
    output.seek(0)
    return {"ok": False, "error": f"exit code {process.returncode}", "trace": output.read().decode(errors="replace")[-3000:]}
