"""Starts a launcher of ranks on this machine, or sbatch, passes signals on to the ranks and returns the exit code. Over ssh: `nodes`."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from launch.job import Command
from launch.rank_logs import copy_ranks

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
AGAIN = 5.0  # seconds between repetitions of a Slurm signal: a rank that still imports its libraries ignores it
LINGER = 10.0  # seconds a launcher may outlive its ranks
LOOK = 2.0  # seconds between two looks at the ranks
LAST = 60.0  # seconds a rank may outlive another of its node. They exit together, and torchrun kills the others of a failed one in 30 s


def start(command: Command, logs: Path | None = None, last: bool = False, received: list[int] | None = None) -> int:
    """Run a command to its end and return its exit code. Signals go to the trainer's processes, past the launchers between.

    torchrun answers SIGTERM by killing a rank's whole group after 30 s, loader workers at once: a checkpoint may take
    longer. So the ranks get the signal directly and end by themselves. A third Ctrl-C kills everything.
    logs: a folder in which each rank's lines go to a file of its own, where the command marks them.
    last: nothing else follows in this process, so signals that come later are ignored. srun sends SIGTERM to all other nodes once one
    has ended: without it a node that had saved and was about to exit with 75 was killed, and the job was not requeued.
    received: gets the signals that were sent to this process.
    """
    received = [] if received is None else received
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit"  # rank 0 writes its exit code here: torchrun turns every code into 1
        env = os.environ | dict(command.env) | {"TRILEVEL_EXIT_FILE": str(exit_file)}
        before = {number: signal.getsignal(number) for number in STOP}
        process: subprocess.Popen[bytes] | None = None
        signalled: set[int] = set()

        def forward(number: int, _frame: Any) -> None:
            received.append(number)
            if process is None:
                return
            if received.count(signal.SIGINT) > 2:
                return stop_hard(process.pid)
            ranks = _ranks(process.pid)
            signalled.update(ranks)
            # a launcher whose ranks got the signal and ended is ending too: another signal would change its exit code
            for pid in ranks or ([] if signalled else [process.pid]):
                _send(pid, passed(number))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        # Slurm signals every process of a step: torchrun does not handle these two and would die of them; it inherits SIG_IGN.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        try:
            # a session of its own: a terminal's Ctrl-C reaches us alone
            out, both = (subprocess.PIPE, subprocess.STDOUT) if logs else (None, None)
            process = subprocess.Popen(command.argv, env=env, stdout=out, stderr=both, start_new_session=True)
            reader = threading.Thread(target=copy_ranks, args=(process.stdout, logs), daemon=True)
            if logs:
                reader.start()
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, forward)
            if received:  # before the process existed
                _send(process.pid, signal.SIGTERM)
            code = _wait(process, received, signalled)
            if logs:
                reader.join(5)  # the last lines
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if last else handler)
        reported = int(exit_file.read_text() or 0) if exit_file.exists() else 0  # empty where the disk is full
    if (
        code < 0 and -code in [passed(one) for one in received] and signalled
    ):  # Slurm signals launchers too; this one's ranks had already ended after the signal
        code = 0
    return reported or (128 - code if code < 0 else code)


def passed(number: int) -> signal.Signals:
    """The signal that ranks get for one sent to us. After SIGHUP the terminal is gone: end as on SIGTERM."""
    return signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)


def _wait(process: subprocess.Popen[bytes], received: list[int], signalled: set[int]) -> int:
    """The exit code. A launcher whose ranks have ended well waits up to 5 minutes for other nodes' launchers; these may have
    failed, so after a signal it gets LINGER seconds. Ranks that an elastic launcher starts after the signal get it as well."""
    gone = float("inf")  # since when no rank is there
    again = float("inf")
    left, look = _Left(), 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
        if not received and time.monotonic() < look:  # a look costs 4 ms of a core
            continue
        ranks, look = _ranks(process.pid), time.monotonic() + LOOK
        if late := left.behind(ranks):
            print(
                f"launch: {len(late)} rank(s), processes {', '.join(map(str, late))}, still run {LAST:g} s after another rank of this "
                "machine has ended, e.g. stopped (SIGSTOP): killed; a run that is complete ends at once when it is started again",
                file=sys.stderr,
            )
            for pid in late:
                _send(pid, signal.SIGKILL)
        if received:
            again = min(again, time.monotonic() + AGAIN)
            if time.monotonic() >= again and received[-1] in (signal.SIGUSR1, signal.SIGUSR2):  # a second one changes nothing
                signalled.difference_update(ranks)  # until they end: imports take minutes on the file system of a cluster
                again = time.monotonic() + AGAIN
            for pid in set(ranks) - signalled:
                signalled.add(pid)
                _send(pid, passed(received[-1]))
            gone = float("inf") if ranks else min(gone, time.monotonic())
            if time.monotonic() > gone + LINGER:
                stop_hard(process.pid)
                process.wait()
                return 0


class _Left:
    """Ranks that are left behind: torchrun waits without limit for a rank that is stopped while it exits."""

    def __init__(self) -> None:
        self._most: set[int] = set()
        self._since = math.inf

    def behind(self, ranks: list[int]) -> list[int]:
        """ranks: process ids of those that run now. The ones to kill: others of the same start have ended LAST seconds ago."""
        if not self._most & set(ranks) or set(ranks) - self._most:  # none before, or an elastic launcher has started others
            self._most, self._since = set(ranks), math.inf
        else:
            self._since = min(self._since, time.monotonic()) if len(ranks) < len(self._most) else math.inf
        late = time.monotonic() > self._since + LAST
        self._since = math.inf if late else self._since
        return ranks if late else []


def submit(script: str) -> int:
    """Hand a batch script to Slurm; sbatch's exit code."""
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def _ranks(pid: int) -> list[int]:
    """The trainer's processes right below a launcher; they pass the signal on to their children (loader workers, which have the words of
    their parent: where that is the process itself it has no ranks)."""
    own = _words(pid)
    return [child for child in _below(pid) if "trainer" in (words := _words(child)) and words != own]


def _below(pid: int, recursive: bool = False) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive)]
    except psutil.Error:
        return []


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stop_hard(pid: int) -> None:
    """SIGKILL to a process and everything it started."""
    for victim in [*_below(pid, recursive=True), pid]:
        _send(victim, signal.SIGKILL)
