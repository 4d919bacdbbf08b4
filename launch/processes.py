"""The one place that starts processes and passes signals on to them: a launcher here, one ssh per node, or sbatch."""

from __future__ import annotations

import contextlib
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

from launch.job import STOPPED, Command
from launch.rank_logs import copy_node, copy_ranks

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
AGAIN = 5.0  # seconds between repetitions of a Slurm signal: a rank that still imports its libraries ignores it
LINGER = 10.0  # seconds a launcher may outlive its ranks
PATIENCE = 120.0  # seconds that the other nodes have to end once one has failed


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
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
        if received:
            ranks = _ranks(process.pid)
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


class _Nodes:
    """One ssh per node. `stop` handles a signal to us: a Ctrl-C at every node, the third one kills."""

    def __init__(self, names: list[str], received: list[int]) -> None:
        self.names, self.received = names, received
        self._own = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: dict[str, int] = {}  # exit codes, in the order in which they ended

    def start(self, commands: list[Command]) -> bool:
        """Whether all were started. After a signal, those that were are killed: nothing is trained yet."""
        pipe = subprocess.PIPE
        for c in commands:
            if self.signals:
                self.kill()
                return False
            self.processes.append(
                subprocess.Popen(c.argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)
            )
        return True

    @property
    def signals(self) -> int:
        return len(self.received) + self._own

    def stop(self, number: int = 0, _frame: Any = None) -> None:
        """number: of the signal; 0 where a node failed."""
        self._own += not number
        self.received += [number] if number else []
        for node in self.processes:
            if self.signals > 2:
                stop_hard(node.pid)
            else:
                _interrupt(node)

    def kill(self) -> None:
        for node in self.processes:
            stop_hard(node.pid)

    def kill_ranks(self) -> None:
        """Three Ctrl-C at every node, at which its launcher kills what it started. A rank that waits in a collective handles no signal, and
        would hold GPUs and journal until engine.timeout after its ssh is gone."""
        for _ in range(3):
            for node in self.processes:
                _interrupt(node)
            time.sleep(0.5)  # signals that come at once are delivered as one

    def running(self, spare: int) -> bool:
        """Whether a node still runs; adds those that failed since the last call, and reports the ones the job continues without."""
        running = None in [node.poll() for node in self.processes]
        for node, name in zip(self.processes, self.names, strict=False):
            if node.returncode and name not in self.failed:
                self.failed[name] = node.returncode
                if len(self.failed) <= spare and not self.signals:
                    print(f"launch: {name} ended with {node.returncode}; the other nodes continue without it", file=sys.stderr)
        return running


def _interrupt(node: subprocess.Popen[bytes]) -> None:
    """A Ctrl-C at the terminal of a node that still runs."""
    if node.poll() is None and node.stdin is not None:
        with contextlib.suppress(OSError):
            node.stdin.write(b"\x03")
            node.stdin.flush()


def run_on_hosts(
    commands: list[Command], names: list[str], logs: Path, spare: int = 0, received: list[int] | None = None
) -> int:
    """Run one ssh per node until all have ended; the first that fails ends the others, of an elastic job the first after `spare`
    lost ones. Returns that one's exit code, or 0.

    Output goes to one file per node in `logs`, and here with the node's name before each line. A signal to us becomes a Ctrl-C at
    every node; the third one kills. received: gets those signals.
    """
    nodes = _Nodes(names, [] if received is None else received)
    before = {number: signal.signal(number, nodes.stop) for number in STOP}
    code = 0 if nodes.start(commands) else 128 + signal.SIGINT
    readers = [
        threading.Thread(target=copy_node, args=(node.stdout, name, logs), daemon=True)
        for node, name in zip(nodes.processes, names, strict=False)
    ]
    for reader in readers:
        reader.start()
    try:
        code = _ended(nodes, logs, spare, code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for reader in readers:
            reader.join(5)
    # a stopped job reports it on the node of rank 0
    code = code or next((one for one in nodes.failed.values() if nodes.signals or one == STOPPED), 0)
    return 128 - code if code < 0 else code


def _ended(nodes: _Nodes, logs: Path, spare: int, code: int) -> int:
    """Waits until all nodes have ended; the exit code of the first failed one after `spare`, else `code`. The others have PATIENCE
    seconds from then on."""
    deadline, running = float("inf"), True
    while running:
        running = nodes.running(spare)
        if len(nodes.failed) > spare and not code:
            name, code = list(nodes.failed.items())[spare]
            deadline = time.monotonic() + PATIENCE
            if not nodes.signals:  # no signal was sent yet; a second one would kill at once
                print(f"launch: {name} ended with {code}; stopping the other nodes; output in {logs}", file=sys.stderr)
                nodes.stop()
        if time.monotonic() > deadline:
            nodes.kill_ranks()
            end = time.monotonic() + LINGER
            while nodes.running(spare) and time.monotonic() < end:
                time.sleep(0.1)
            nodes.kill()
        time.sleep(0.1)
    return code


def submit(script: str) -> int:
    """Hand a batch script to Slurm; sbatch's exit code."""
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def _ranks(pid: int) -> list[int]:
    """The trainer's processes right below a launcher; they pass the signal on to their children (loader workers)."""
    return [child for child in _below(pid) if "trainer" in _words(child)]


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
