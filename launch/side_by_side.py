"""Starts several independent commands of one process each, some at a time; a signal is passed on to all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from launch.job import Command
from launch.processes import STOP, passed, stop_hard
from launch.rank_logs import ensure_folder


def start_side_by_side(commands: Mapping[str, Command], jobs: int, logs: Path, ended: Callable[[str], None]) -> dict[str, int]:
    """Run the commands in their order, `jobs` at a time, and return {name: exit code} of those that were started.

    Output goes to LOGS/NAME/output.txt. After a signal no further one is started; the third one kills. A command that fails leaves
    the others alone. ended: called with the name of each command that has ended.
    """
    waiting, running, codes = list(commands), dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]](), dict[str, int]()
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for process, _ in running.values():
            if len(received) > 2:
                stop_hard(process.pid)
            elif process.poll() is None:
                process.send_signal(passed(number))

    before = {number: signal.signal(number, forward) for number in STOP}
    try:
        while running or (waiting and not received):
            while waiting and len(running) < jobs and not received:
                name = waiting.pop(0)
                file = (ensure_folder(logs / name, f"--logs {logs}") / "output.txt").open("ab")
                print(f"launch: {name} started; output in {file.name}", flush=True)
                env = os.environ | dict(commands[name].env)
                running[name] = (
                    subprocess.Popen(
                        commands[name].argv, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    ),
                    file,
                )
            time.sleep(0.2)
            for name, (process, file) in list(running.items()):
                if (code := process.poll()) is not None:
                    file.close()
                    del running[name]
                    codes[name] = 128 - code if code < 0 else code
                    print(f"launch: {name} ended with {codes[name]}", flush=True)
                    ended(name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and waiting and not any(codes.values()):  # stopped between two runs
        codes[waiting[0]] = 128 + signal.SIGINT
    return codes
