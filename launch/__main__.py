"""`python -m launch COMMAND CONFIG [key=value ...]`: one handler per command. `processes` starts what they render."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from launch import health, hosts, local, slurm, study, sweep
from launch.arguments import given_for_slurm, parse
from launch.job import STOPPED, Command, Job, LaunchError, Nodes, check, launcher, name_of
from launch.machine import free_port, random_port, this_machine
from launch.nodes import run_on_hosts
from launch.processes import start, submit
from launch.rank_logs import ensure_folder, forgive_standard_streams, open_standard_streams
from launch.restarts import Attempt, NotReadyError, Restarts, repeated, run_directory


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 finished, 75 stopped with a checkpoint, 2 refused, 128 + n ended by signal n, else the trainer's."""
    open_standard_streams()
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        if words is None and not arguments.dry_run:
            forgive_standard_streams()
        if arguments.command == "sweep":
            return _sweep(arguments)
        if arguments.command == "study":
            return study.main(arguments)
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
    if refused := start(first):
        return refused

    def prepare() -> Attempt:
        if not a.no_health and (why := _unhealthy(job, node.processes if node.gpus else 0)):
            raise NotReadyError(why)
        return lambda received: start(local.render(job, replace(node, port=free_port()), sys.executable), received=received)

    return repeated(prepare, _restarts(job, a, job.resume))


def _unhealthy(job: Job, gpus: int) -> str:
    """Why this node can't be used, "" if it can. gpus: that it needs."""
    here = os.uname().nodename
    wrong = health.judge({here: health.probe(run_directory(job), rates=gpus > 0)}, gpus, gpus > 0)
    return f"{here}: {wrong[here]}" if wrong else ""


def _restarts(job: Job, a: argparse.Namespace, resumed: bool) -> Restarts:
    """resumed: whether the trainer continues from its newest checkpoint; else a failure is not repeated."""
    if a.restarts < 0:
        raise LaunchError(f"--restarts {a.restarts}: must be >= 0; 0 never starts a failed run again")
    return Restarts(run_directory(job), a.restarts if resumed else 0, a.typed)


def _node(job: Job, a: argparse.Namespace) -> int:
    nodes = Nodes.read(a.nodes)
    if not 0 <= a.number < nodes.most:
        raise LaunchError(f"--number {a.number} with --nodes {a.nodes}: nodes count from 0")
    place = replace(local.place(this_machine(), a.processes, a.port), address=a.address, nodes=nodes.most, number=a.number)
    if nodes.elastic:
        place = replace(place, least=nodes.least, own_address=a.here or os.uname().nodename)
    with tempfile.TemporaryDirectory(prefix="trilevel-", ignore_cleanup_errors=True) as tee:
        command = launcher(job, replace(place, tee=tee), sys.executable)
        if a.dry_run:
            print(command.text())
            return 0
        if "SLURM_JOB_ID" in os.environ and (why := _unhealthy(job, place.processes if place.gpus else 0)):
            print(f"launch: {why}; to leave it out: launch slurm --sbatch=--exclude=NODE", file=sys.stderr)
            return 1
        return start(command, _folder(job, a) if place.world > 1 else None, last=True)


def _hosts(job: Job, a: argparse.Namespace) -> int:
    try:
        found = hosts.read(Path(a.hostfile).read_text(encoding="utf-8-sig"), a.hostfile)
    except UnicodeDecodeError as error:
        raise LaunchError(f"--hostfile {a.hostfile}: not UTF-8 text; write one host per line, e.g. `node1 slots=8`") from error
    except OSError as error:
        raise LaunchError(
            f"--hostfile {a.hostfile}: {error.strerror}; write one host per line, e.g. `node1 slots=8`"
        ) from error
    first, nodes = hosts.chosen(found, a.nodes)
    processes = hosts.processes_of(first, a.processes)
    env, directory = dict(os.environ), Path.cwd()
    for name in hosts.PASSED:
        if hosts.holds_credential(name, env.get(name, "")):
            print(
                f"launch: {name} is not passed on, it may hold a credential and command lines can be read by others; set it on every host",
                file=sys.stderr,
            )

    def commands(taken: list[hosts.Host]) -> list[Command]:
        port, asked = a.port or random_port(), Nodes(nodes.least, len(taken))
        again = replace(job, resume=job.resume or nodes.elastic)
        return hosts.render(again, taken, asked, processes, port, sys.executable, directory, env, a.ssh_config, a.logs)

    checks = _checks(job, nodes, processes)
    if a.dry_run:
        print("\n".join(command.text() for command in (*checks, *commands(first))))
        return 0
    if shutil.which("ssh") is None:
        raise LaunchError("ssh not found: install openssh-client, or use --dry-run to see the commands")
    if refused := next((code for code in map(start, checks) if code), 0):
        return refused
    folder, runs = _folder(job, a), run_directory(job)

    def ask(some: list[hosts.Host]) -> dict[str, str]:
        probes = hosts.health_checks(some, runs, sys.executable, directory, env, a.ssh_config)
        return health.judge(health.ask(probes), processes)

    def prepare() -> Attempt:
        taken = first if a.no_health else hosts.healthy(found, nodes, ask)
        if not taken:
            raise NotReadyError(
                f"at least {nodes.least} usable host(s) needed: repair those, list others, or skip the check: --no-health"
            )
        names = [host.name for host in taken]
        return lambda received: run_on_hosts(commands(taken), names, folder, len(taken) - nodes.least, received)

    return repeated(prepare, _restarts(job, a, job.resume or nodes.elastic))


def _folder(job: Job, a: argparse.Namespace) -> Path:
    """The folder of a run's output."""
    return ensure_folder(Path(a.logs) / name_of(job), f"--logs {a.logs}")


def _slurm(job: Job, a: argparse.Namespace) -> int:
    request = _request(a)
    checks = _checks(job, request.nodes, request.processes)
    return _submit(checks, slurm.render(job, request, _python(a), str(run_directory(job))), a)


def _python(a: argparse.Namespace) -> str:
    """Of the nodes: ours, or an image's own."""
    return a.python or ("python" if a.container else sys.executable)


def _request(a: argparse.Namespace) -> slurm.SlurmRequest:
    processes = a.gpus or 1 if a.processes is None else a.processes
    if processes > 1 and a.cpus is None and not any(option.startswith(("--cpus-per-", "-c")) for option in a.sbatch):
        print(
            f"launch: without --cpus Slurm gives the {processes} processes of a node 1 core together, unless the partition has "
            "DefCpuPerGPU; pass --cpus N, cores per process: data.workers + 1",
            file=sys.stderr,
        )
    return slurm.SlurmRequest(
        nodes=Nodes.read(a.nodes), processes=processes, gpus=a.gpus, cpus=a.cpus, time=a.time, signal=a.signal,
        requeue=not a.no_requeue, account=a.account, partition=a.partition, qos=a.qos, constraint=a.constraint, output=a.output,
        modules=tuple(a.module), setup=tuple(a.setup), extra=tuple(a.sbatch), container=a.container, runtime=a.runtime,
        logs=a.logs, restarts=a.restarts,
    )  # fmt: skip


def _submit(checks: list[Command], script: str, a: argparse.Namespace) -> int:
    if a.dry_run:
        first, rest = script.split("\n", 1)  # #!/bin/bash
        print("\n".join([first, *(_comment(command.text()) for command in checks), rest]), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch not found: run this on a login node, or use --dry-run to see the script")
    if refused := next((code for code in map(start, checks) if code), 0):
        return refused
    if a.output and "%" not in (folder := str(Path(a.output).parent)):  # a job whose output has no folder fails without a word
        ensure_folder(Path(folder), f"--output {a.output}")
    return submit(script)


def _comment(text: str) -> str:
    """Every line of it behind a #: a word may hold a newline."""
    return "\n".join(f"# {line}" for line in re.split(r"[\r\n]", text))


def _sweep(a: argparse.Namespace) -> int:
    """Exit code: 0 all are finished (or submitted), 75 stopped, 1 a run failed, 2 refused."""
    if ignored := [] if a.slurm else given_for_slurm(a):
        raise LaunchError(f"{', '.join(ignored)} without --slurm: only Slurm uses it; add --slurm, or remove it")
    found = sweep.points(a.config, a.overrides, a.set, a.seeds, a.name)
    found = [sweep.with_status(point) for point in found]
    left = [point for point in found if not point.finished]
    # a finished run of other settings is no result of this sweep; the check with --resume compares them
    checked = sweep.distinct_settings(left) + sweep.distinct_settings(
        [p for p in found if p.finished and not sweep.unchanged(p)]
    )
    if a.slurm and left:
        request = _request(a)
        checks = [c for point in checked for c in _checks(point.job, request.nodes, request.processes)]
        jobs, runs = [point.job for point in left], [str(point.directory) for point in left]
        return _submit(checks, slurm.render_array(jobs, request, _python(a), a.name, runs, a.at_once), a)
    node = local.place(this_machine(), a.processes, free_port())
    checks = [check(point.job, node.world, sys.executable) for point in checked]
    if a.dry_run:
        print("\n".join(c.text() for c in (*checks, *(local.render(point.job, node, sys.executable) for point in left))))
        return 0
    if code := next((code for code in map(start, checks) if code), 0):
        return code
    for point in left:
        print(f"launch: {point.name} ({point.state})", flush=True)
        ended = start(local.render(point.job, replace(node, port=free_port()), sys.executable))
        if ended in (STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGKILL):
            code = ended
            break
        code = code or int(ended != 0)
    print(sweep.table([sweep.with_status(point) for point in found]))
    return code


def _checks(job: Job, nodes: Nodes, processes: int) -> list[Command]:
    """The dry check in the largest and in the smallest world that a job may meet."""
    worlds = dict.fromkeys((nodes.most * processes, nodes.least * processes))
    return [check(job, world, sys.executable) for world in worlds]


COMMANDS = {"local": _local, "node": _node, "hosts": _hosts, "slurm": _slurm}

if __name__ == "__main__":
    sys.exit(main())
