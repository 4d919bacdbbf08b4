"""One ssh per node: starts them, passes signals on, ends the others when one has failed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launch.job import STOPPED, Command
from launch.processes import LINGER, STOP, stop_hard
from launch.rank_logs import copy_node

PATIENCE = 120.0  # seconds that the other nodes have to end once one has failed
LEFT = 600.0  # the same once one has ended well: torchrun's agents wait up to 300 s for each other


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
    seconds from then on, LEFT from the end of one that ended well."""
    deadline, running = float("inf"), True
    while running:
        running = nodes.running(spare)
        if len(nodes.failed) > spare and not code:
            name, code = list(nodes.failed.items())[spare]
            deadline = time.monotonic() + PATIENCE
            if not nodes.signals:  # no signal was sent yet; a second one would kill at once
                print(f"launch: {name} ended with {code}; stopping the other nodes; output in {logs}", file=sys.stderr)
                nodes.stop()
        if deadline == float("inf") and not spare and any(node.poll() == 0 for node in nodes.processes):
            deadline = time.monotonic() + LEFT  # all end together, unless one is frozen; those of an elastic job may leave
        if running and time.monotonic() > deadline:
            late = [name for node, name in zip(nodes.processes, nodes.names, strict=False) if node.poll() is None]
            print(
                f"launch: killed on {', '.join(late)}, which still ran after another node had ended; output in {logs}",
                file=sys.stderr,
            )
            nodes.kill_ranks()
            end = time.monotonic() + LINGER
            while nodes.running(spare) and time.monotonic() < end:
                time.sleep(0.1)
            nodes.kill()
        time.sleep(0.1)
    return code
