"""`python -m launch COMMAND CONFIG [key=value ...]`: the one place that starts processes and passes signals on to them."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import psutil

from launch import hosts, local, slurm
from launch.arguments import parse
from launch.job import Command, Job, LaunchError, accelerate, check
from launch.machine import free_port, this_machine

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LINGER = 10.0  # seconds a launcher may outlive its ranks
PATIENCE = 120.0  # seconds that the other nodes have to end once one has failed


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 finished, 75 stopped with a checkpoint, 2 refused, 128 + n ended by signal n, else the trainer's."""
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        job = Job(arguments.config, tuple(arguments.overrides), arguments.resume)
        return COMMANDS[arguments.command](job, arguments)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def _local(job: Job, a: argparse.Namespace) -> int:
    node = local.place(this_machine(), a.processes, free_port())
    first, command = check(job, node.world, sys.executable), local.render(job, node, sys.executable)
    if a.dry_run:
        print(f"{first.text()}\n{command.text()}")
        return 0
    return start(first) or start(command)


def _node(job: Job, a: argparse.Namespace) -> int:
    if not 0 <= a.number < a.nodes:
        raise LaunchError(f"--number {a.number} with --nodes {a.nodes}: nodes are counted from 0")
    node = local.place(this_machine(), a.processes, a.port)
    return start(accelerate(job, replace(node, address=a.address, nodes=a.nodes, number=a.number), sys.executable))


def _hosts(job: Job, a: argparse.Namespace) -> int:
    try:
        found = hosts.read(Path(a.hostfile).read_text(), a.hostfile)
    except OSError as error:
        raise LaunchError(
            f"--hostfile {a.hostfile}: {error.strerror}; write one host per line, e.g. `node1 slots=8`"
        ) from error
    processes = hosts.processes_of(found, a.processes)
    first = check(job, processes * len(found), sys.executable)
    commands = hosts.render(job, found, processes, a.port, sys.executable, Path.cwd(), dict(os.environ))
    if a.dry_run:
        print("\n".join(command.text() for command in (first, *commands)))
        return 0
    return start(first) or together(commands, [host.name for host in found], Path(a.logs))


def _slurm(job: Job, a: argparse.Namespace) -> int:
    request = slurm.Request(
        nodes=a.nodes, processes=a.processes or a.gpus or 1, gpus=a.gpus, cpus=a.cpus, time=a.time, signal=a.signal,
        requeue=not a.no_requeue, account=a.account, partition=a.partition, qos=a.qos, constraint=a.constraint, output=a.output,
        modules=tuple(a.module), setup=tuple(a.setup), extra=tuple(a.sbatch), container=a.container, runtime=a.runtime,
    )  # fmt: skip
    first = check(job, request.nodes * request.processes, sys.executable)
    script = slurm.render(job, request, a.python or sys.executable)
    if a.dry_run:
        print(f"# {first.text()}\n{script}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch is not found: start this where jobs are submitted, or use --dry-run to see the script")
    return start(first) or subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


# -- processes -------------------------------------------------------------------------------------------------------------


def start(command: Command) -> int:
    """Run a command to its end and return its exit code. Signals go to the trainer's processes, past the launchers between.

    torchrun answers SIGTERM by killing a rank's whole group after 30 s, loader workers at once: a checkpoint may take
    longer. So the ranks hear of it directly and end by themselves. A third Ctrl-C kills everything.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "exit"  # rank 0's own exit code: torchrun turns every one into 1
        env = os.environ | dict(command.env) | {"TRILEVEL_EXIT_FILE": str(told)}
        before = {number: signal.getsignal(number) for number in STOP}
        # Slurm signals every process of a step: torchrun, which knows nothing of these two, would die of them
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        # a session of its own: a terminal's Ctrl-C reaches us alone
        process = subprocess.Popen(command.argv, env=env, start_new_session=True)
        heard, interrupts = False, 0

        def forward(number: int, _frame: Any) -> None:
            nonlocal heard, interrupts
            heard, interrupts = True, interrupts + (number == signal.SIGINT)
            if interrupts > 2:
                return _kill(process.pid)
            # nobody is there to read a line any more: end like on SIGTERM
            passed = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            for rank in _ranks(process.pid) or [process.pid]:
                _send(rank, passed)

        for number in STOP:
            signal.signal(number, forward)
        try:
            code = _wait(process, lambda: heard)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        said = int(told.read_text()) if told.exists() else 0
    return 128 - code if code < 0 else said or code


def _wait(process: subprocess.Popen[bytes], told_to_end: Callable[[], bool]) -> int:
    """The exit code. A launcher whose ranks have ended well waits up to 5 minutes for other nodes' launchers; these may have
    failed, so once told to end it is given LINGER seconds."""
    gone = float("inf")  # since when no rank is there
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
        if told_to_end():
            gone = float("inf") if _ranks(process.pid) else min(gone, time.monotonic())
            if time.monotonic() > gone + LINGER:
                _kill(process.pid)
                process.wait()
                return 0


def together(commands: list[Command], names: list[str], logs: Path) -> int:
    """Run one ssh per node until all have ended; the first that fails ends the others. Returns the first exit code above 0.

    Output goes to one file per node, and here with the node's name before each line. A signal to us becomes a Ctrl-C at
    every node; the third one kills.
    """
    logs.mkdir(parents=True, exist_ok=True)
    nodes = [
        subprocess.Popen(
            c.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        for c in commands
    ]
    readers = [
        threading.Thread(target=_copy, args=(node.stdout, name, logs / f"{name}.txt"), daemon=True)
        for node, name in zip(nodes, names, strict=True)
    ]
    for reader in readers:
        reader.start()
    heard = 0

    def stop(*_: Any) -> None:
        nonlocal heard
        heard += 1
        for node in nodes:
            if heard > 2:
                _kill(node.pid)
            elif node.poll() is None and node.stdin is not None:
                with contextlib.suppress(OSError):
                    node.stdin.write(b"\x03")
                    node.stdin.flush()

    before = {number: signal.signal(number, stop) for number in STOP}
    code, deadline = 0, float("inf")
    try:
        while None in [node.poll() for node in nodes]:
            failed = [(node.returncode, name) for node, name in zip(nodes, names, strict=True) if node.returncode]
            if failed and not code:
                code, name = failed[0]
                deadline = time.monotonic() + PATIENCE
                if not heard:  # nobody has asked them to end yet, and asking twice means at once
                    print(f"launch: {name} ended with {code}; the others are told to end, see {logs}", file=sys.stderr)
                    stop()
            if time.monotonic() > deadline:
                for node in nodes:
                    _kill(node.pid)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for reader in readers:
            reader.join(5)
    code = code or next((node.returncode for node in nodes if node.returncode), 0)
    return 128 - code if code < 0 else code


def _copy(stream: IO[bytes], name: str, path: Path) -> None:
    with path.open("wb") as file:
        for line in stream:
            line = line.replace(b"\r\n", b"\n")
            file.write(line)
            file.flush()
            sys.stdout.write(f"[{name}] {line.decode(errors='replace')}")
            sys.stdout.flush()


def _ranks(pid: int) -> list[int]:
    """The trainer's processes right below a launcher; their own children (loader workers) hear from them."""
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


def _kill(pid: int) -> None:
    """SIGKILL to a process and everything it started."""
    for victim in [*_below(pid, recursive=True), pid]:
        _send(victim, signal.SIGKILL)


COMMANDS = {"local": _local, "node": _node, "hosts": _hosts, "slurm": _slurm}

if __name__ == "__main__":
    sys.exit(main())
