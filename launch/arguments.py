"""Arguments of `python -m launch`; an unknown command or flag names the nearest known one."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any, NoReturn

from launch import kept_journals
from launch.job import LOGS, LaunchError, near
from launch.restarts import RESTARTS

ELASTIC = "MIN:MAX starts with the nodes that are up and continues from the checkpoint while at least MIN remain"
ALLOWED = "data.allow_pipe=true"  # how the trainer's command line takes it


class Parser(argparse.ArgumentParser):
    """Raises LaunchError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}\n{self.format_usage().rstrip()}")


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command; settings may stand before and after flags. Raises LaunchError naming what is near."""
    parser = Parser("python -m launch", description="Check a run, then start it here, over ssh or on Slurm.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_runs(commands)
    _add_sweep(commands)
    _add_study(commands)
    if words and not words[0].startswith("-") and words[0] not in commands.choices:
        raise LaunchError(f"unknown command {words[0]!r}{near(words[0], list(commands.choices))}")
    found, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            flags = [flag for action in commands.choices[found.command]._actions for flag in action.option_strings]
            setting = f"; a setting is written without dashes: {word.lstrip('-')}" if "=" in word else ""
            raise LaunchError(f"{word}: unknown flag{near(word.partition('=')[0], flags)}{setting}")
    if found.command == "sweep":
        found.config = [word for word in found.words if "=" not in word]
        found.overrides = [word for word in found.words if "=" in word]
        if not found.config:
            raise LaunchError("sweep: no CONFIG given")
    found.overrides, found.typed = [*found.overrides, *rest], list(words)
    allowed = found.allow_pipe or os.environ.get("TRILEVEL_ALLOW_PIPE") == "1"
    if allowed and ALLOWED not in found.overrides:  # as a word, so that every node gets it
        found.overrides.append(ALLOWED)
    return found


def _add_runs(commands: Any) -> None:
    """The commands that start one run."""

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("config", metavar="CONFIG", help="YAML of the run")
        command.add_argument(
            "overrides", metavar="key.sub=value", nargs="*", default=[], help="settings that differ from the file"
        )
        command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
        _add_pipe(command)
        return command

    c = add("local", "this machine: all GPUs, or CPU processes")
    c.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, without GPUs 2 on the CPU")
    _add_restarts(c)
    _add_health(c)
    c.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")

    c = add("node", "this machine as one node of many; `hosts` and `slurm` call it")
    c.add_argument("--processes", type=int, metavar="N", help="on this node; default as for local")
    c.add_argument("--nodes", metavar="N|MIN:MAX", required=True)
    c.add_argument("--number", type=int, metavar="K", required=True, help="of this node, from 0")
    c.add_argument("--address", required=True, help="of node 0")
    c.add_argument("--port", type=_port, required=True, help="free on node 0, the same for all")
    c.add_argument("--here", metavar="ADDRESS", help="of this node, for elastic jobs (default: its host name)")
    c.add_argument("--logs", metavar="DIR", default=LOGS, help=f"DIR/NAME/rank-N.txt: output of each rank (default: {LOGS})")
    c.add_argument("--dry-run", action="store_true", help="print the command, start nothing")

    c = add("hosts", "the hosts of a file, over ssh")
    c.add_argument("--hostfile", metavar="FILE", required=True, help="one host per line: `name slots=8`")
    c.add_argument("--processes", type=int, metavar="N", help="per host, where the file has no slots")
    c.add_argument("--nodes", metavar="N|MIN:MAX", help=f"the first N hosts; {ELASTIC} (default: all)")
    c.add_argument("--port", type=_port, help="free on the first host (default: a random one from 20000 to 29999)")
    c.add_argument("--ssh-config", metavar="FILE", help="read by ssh instead of ~/.ssh/config: keys, users, known hosts, ports")
    c.add_argument("--logs", metavar="DIR", default=LOGS, help=f"DIR/NAME/HOST.txt and rank-N.txt (default: {LOGS})")
    _add_restarts(c)
    _add_health(c)
    c.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")

    c = add("slurm", "a batch job of Slurm")
    _add_slurm(c)
    c.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def _add_sweep(commands: Any) -> None:
    text = "configurations x settings x seeds, one run each; the same command again continues the sweep"
    c = commands.add_parser("sweep", help=text, description=text, allow_abbrev=False)
    c.add_argument("words", metavar="CONFIG|key.sub=value", nargs="+", help="YAMLs, and settings that differ from all of them")
    _add_pipe(c)
    c.add_argument("--seeds", default="0", metavar="0,1,2", help="default: 0")
    c.add_argument("--set", action="append", default=[], metavar="key.sub=A,B", help="one run per value; repeatable")
    c.add_argument(
        "--name", default="sweep", help="prefix of the runs' names, and name of their parent run in MLflow (default: sweep)"
    )
    c.add_argument("--slurm", action="store_true", help="as an array of Slurm; else here, one after the other")
    c.add_argument("--at-once", type=int, metavar="N", help="tasks of the array that run together (default: all)")
    _add_slurm(c)
    c.add_argument("--dry-run", action="store_true", help="print every command, start nothing")


def _add_study(commands: Any) -> None:
    text = "the arms of a study x its seeds, one run each; the same command again continues the study"
    c = commands.add_parser("study", help=text, description=text, allow_abbrev=False)
    c.add_argument("file", metavar="FILE", help="configs/studies/NAME.yaml")
    c.add_argument("overrides", metavar="key.sub=value", nargs="*", default=[], help="settings that differ from the study's")
    _add_pipe(c)
    c.add_argument("--seeds", metavar="0,1,2", help="default: those of the file")
    c.add_argument("--arms", metavar="A,B", help="only these, in the order of the file (default: all)")
    c.add_argument(
        "--jobs", type=int, metavar="N", help="runs of one process side by side (default: one after the other on all devices)"
    )
    c.add_argument("--processes", type=int, metavar="N", help="of each run without --jobs; default as for local")
    c.add_argument("--journals", metavar="DIR", help=f"journals of finished runs, compressed (default: {kept_journals.FOLDER})")
    c.add_argument(
        "--logs", metavar="DIR", default=LOGS, help=f"DIR/NAME/output.txt: output of each run with --jobs (default: {LOGS})"
    )
    c.add_argument("--check", action="store_true", help="check the configuration of every arm, start nothing")
    c.add_argument("--keep", action="store_true", help="compress the journals of finished runs into --journals, start nothing")
    c.add_argument("--dry-run", action="store_true", help="print every command, start nothing")


def _add_restarts(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        metavar="N",
        help=f"with --resume: start a failed run again until N failures have the same newest checkpoint (default: {RESTARTS})",
    )


def _add_health(c: argparse.ArgumentParser) -> None:
    c.add_argument("--no-health", action="store_true", help="start without the check of GPUs, disk and clock of each node")


def _add_pipe(c: argparse.ArgumentParser) -> None:
    c.add_argument("--allow-pipe", action="store_true", help="run the commands of `pipe:COMMAND` shards in a shell")


def _add_slurm(c: argparse.ArgumentParser) -> None:
    c.add_argument("--nodes", default="1", metavar="N|MIN:MAX", help=f"{ELASTIC} (default: 1)")
    c.add_argument("--gpus", type=int, default=0, metavar="N", help="per node, one process each")
    c.add_argument("--processes", type=int, metavar="N", help="per node without GPUs (default: 1)")
    c.add_argument(
        "--cpus", type=int, metavar="N", help="cores per process: data.workers + 1 (default: Slurm's, often 1 per node)"
    )
    c.add_argument("--time", help="limit, e.g. 1-00:00:00")
    c.add_argument(
        "--signal",
        type=int,
        default=300,
        metavar="SECONDS",
        help="before the time limit: save and end (default: 300)",
    )
    c.add_argument("--no-requeue", action="store_true", help="end at the time limit instead of requeueing the job")
    _add_restarts(c)
    for name in ("account", "partition", "qos", "constraint"):
        c.add_argument(f"--{name}")
    c.add_argument("--logs", metavar="DIR", default=LOGS, help=f"DIR/NAME/rank-N.txt: output of each rank (default: {LOGS})")
    c.add_argument("--output", help="file of the job's output (default: slurm-%%j.txt, of an array slurm-%%A_%%a.txt)")
    c.add_argument("--module", action="append", default=[], metavar="NAME", help="module to load; repeatable")
    c.add_argument("--setup", action="append", default=[], metavar="LINE", help="line of shell before the run; repeatable")
    c.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--exclusive; repeatable")
    c.add_argument("--container", metavar="IMAGE")
    c.add_argument("--runtime", default="apptainer", help="of the container: apptainer or pyxis")
    c.add_argument("--python", help="on the nodes (default: this one; with --container the image's `python`)")


def given_for_slurm(found: argparse.Namespace) -> list[str]:
    """The flags of a sweep that only Slurm uses, and that differ from their defaults."""
    blank = argparse.ArgumentParser(add_help=False)
    _add_slurm(blank)
    blank.add_argument("--at-once")
    unlike = [name for name, value in vars(blank.parse_args([])).items() if getattr(found, name) != value]
    return [f"--{name.replace('_', '-')}" for name in unlike if name != "processes"]


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text:.80}: not a port; use a number from 1 to 65535")
    return int(text)
