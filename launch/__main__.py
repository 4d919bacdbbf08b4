"""`python -m launch local CONFIG [key=value ...]`: the one place that starts processes and passes signals on to them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import psutil

from launch import local
from launch.job import Command, Job, LaunchError, check

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 finished, 75 stopped with a checkpoint, 2 refused, 128 + n ended by signal n, else the trainer's."""
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        return arguments.run(arguments)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def _local(a: argparse.Namespace) -> int:
    job = Job(a.config, tuple(a.overrides), a.resume)
    machine = local.Machine(count_gpus(), len(os.sched_getaffinity(0)), _threads())
    node = local.place(machine, a.processes, free_port())
    first, command = check(job, node.world, sys.executable), local.render(job, node, sys.executable)
    if a.dry_run:
        print(f"{first.text()}\n{command.text()}")
        return 0
    return start(first) or start(command)


# -- the command line ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what was meant; a setting may stand before or after a flag."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}\n{self.format_usage().rstrip()}")


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command. Raises LaunchError for what is not known, with what is near."""
    parser = Parser("python -m launch", description="Where a run is trained: renders the commands, checks the run, starts it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    a = commands.add_parser("local", help="this machine: all GPUs, or CPU processes", allow_abbrev=False)
    a.set_defaults(run=_local)
    a.add_argument("config", metavar="CONFIG", help="YAML of the run")
    a.add_argument("overrides", metavar="key.sub=value", nargs="*", default=[], help="settings that differ from the file")
    a.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, without GPUs 2 on the CPU")
    a.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    a.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    if words and not words[0].startswith("-") and words[0] not in commands.choices:
        raise LaunchError(f"{words[0]!r} is no command{_near(words[0], list(commands.choices))}")
    found, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            flags = [flag for action in commands.choices[found.command]._actions for flag in action.option_strings]
            raise LaunchError(f"{word}: unknown flag{_near(word.partition('=')[0], flags)}")
    found.overrides = [*found.overrides, *rest]
    return found


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


# -- this machine ----------------------------------------------------------------------------------------------------------


def count_gpus(python: str = sys.executable) -> int:
    """GPUs that this Python's torch can use. Raises LaunchError where the machine has some and torch sees none.

    torch is asked in a process of its own, and only where something points to a GPU: it takes seconds to import.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/gpus").exists() or Path("/dev/kfd").exists()):
        return 0
    asked = subprocess.run(
        [python, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise LaunchError(
            f"{python} can't import torch:\n{asked.stderr[-2000:]}\nrun this with the Python of the project's environment"
        )
    found = int(asked.stdout.split()[-1])
    listed = _listed_gpus()
    if listed and not found:
        raise LaunchError(
            f"this machine has {listed} GPU(s) and torch sees none: a CPU build of torch, or a driver older than its CUDA "
            "(`trilevel doctor` tells); set CUDA_VISIBLE_DEVICES= to train on the CPU all the same"
        )
    return found


def _listed_gpus() -> int:
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _threads() -> int | None:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else None


# -- processes -------------------------------------------------------------------------------------------------------------


def start(command: Command) -> int:
    """Run a command to its end and return its exit code. Signals go to the trainer's processes, past the launchers between.

    torchrun answers SIGTERM by killing a rank's whole group after 30 s, loader workers at once: a checkpoint may take
    longer. So the ranks hear of it directly and end by themselves. A third Ctrl-C kills everything.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "exit"  # rank 0's own exit code: torchrun turns every one into 1
        env = os.environ | dict(command.env) | {"TRILEVEL_EXIT_FILE": str(told)}
        # a session of its own: a terminal's Ctrl-C reaches us alone
        process = subprocess.Popen(command.argv, env=env, start_new_session=True)
        interrupts = 0

        def forward(number: int, _frame: Any) -> None:
            nonlocal interrupts
            interrupts += number == signal.SIGINT
            if interrupts > 2:
                for victim in [*_below(process.pid, recursive=True), process.pid]:
                    _send(victim, signal.SIGKILL)
                return
            # nobody is there to read a line any more: end like on SIGTERM
            passed = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            for rank in _ranks(process.pid) or [process.pid]:
                _send(rank, passed)

        before = {number: signal.signal(number, forward) for number in STOP}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        said = int(told.read_text()) if told.exists() else 0
    return 128 - code if code < 0 else said or code


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


if __name__ == "__main__":
    sys.exit(main())
