"""`python -m launch study FILE`: the arms of a study x seeds, one run each, over the machinery of `sweep`.

Seeds are outermost and arms in the order of the file, so that a study that is stopped at any time has compared its first arms on
equal seeds. A run is finished if its run directory or its kept journal is.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from launch import kept_journals, local, study_file, sweep
from launch.job import STOPPED, Command, Job, LaunchError, check
from launch.machine import free_port, this_machine
from launch.processes import start
from launch.side_by_side import start_side_by_side
from launch.study_file import Study
from launch.sweep import Point

# settings that change neither results nor the meaning of an arm
FREE = (
    "data.train",
    "data.validation",
    "data.index",
    "data.cache",
    "data.cache_size",
    "data.workers",
    "data.allow_pipe",
    "runs",
)
ENDED = (STOPPED, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)))


@dataclass(frozen=True)
class Run:
    """A run of a study; `kept`: where its journal is kept once it has finished."""

    point: Point
    kept: Path

    @property
    def journal(self) -> Path:
        return self.point.directory / "journal.jsonl"


def runs(study: Study, overrides: list[str], seeds: list[int], arms: list[str], journals: str) -> list[Run]:
    """Every run with its state, seeds outermost. Raises LaunchError for an unknown arm or a setting of the study itself."""
    study_file.known("--arms", arms, study.arms)
    for text in overrides:
        if text.partition("=")[0] in ("name", "seed", "tracking.parent"):
            raise LaunchError(f"{text}: set by the study itself; remove it")
    found = []
    for seed in seeds:
        for arm in [arm for arm in study.arms if arm in arms]:
            name = f"{study.name}-{arm}-seed{seed}"
            given = [*study.settings(arm, seed), *overrides]
            _, folder = sweep.about(study.config, given)
            given += [f"name={name}", f"seed={seed}", f"tracking.parent={study.name}"]
            point = sweep.with_status(Point(Job(study.config, tuple(given), resume=True), name, folder / name))
            kept = kept_journals.path_of(journals, study.name, arm, seed)
            if not point.finished and kept.is_file():
                point = sweep.status_of(point, kept_journals.lines(kept))
            found.append(Run(point, kept))
    return found


def main(a: argparse.Namespace) -> int:
    """Exit code: 0 all are finished, 75 stopped, 1 a run failed, 2 refused."""
    study = study_file.read(a.file)
    changed = [text for text in a.overrides if not text.startswith((*(f"{key}=" for key in FREE), "tracking."))]
    if changed and (a.journals is None or not any(text.startswith("runs=") for text in a.overrides)):
        raise LaunchError(
            f"{changed[0]}: differs from the study; give these runs folders of their own with --journals DIR and runs=DIR, "
            "or change the study's file"
        )
    journals = a.journals or kept_journals.FOLDER
    seeds = list(study.seeds) if a.seeds is None else sweep.seeds_of(a.seeds)
    found = runs(study, a.overrides, seeds, list(study.arms) if a.arms is None else a.arms.split(","), journals)
    if a.jobs is not None and a.jobs < 1:
        raise LaunchError(f"--jobs {a.jobs}: at least 1")
    if a.keep:
        _keep(found)
        print(_table(found, study, journals))
        return 0
    left = [run for run in found if not run.point.finished]
    one = _one_after_the_other if a.jobs is None else _side_by_side
    return one(study, found, left, a, journals)


def _one_after_the_other(study: Study, found: list[Run], left: list[Run], a: argparse.Namespace, journals: str) -> int:
    """Each on all devices of this machine, as `launch local` starts it."""
    node = local.place(this_machine(), a.processes, free_port())
    checks = _checks(found if a.check else left, node.world)
    if a.dry_run:
        return _print(checks, [local.render(run.point.job, node, sys.executable) for run in left])
    code = _check(checks)
    for run in left if not code and not a.check else ():
        print(f"launch: {run.point.name} ({run.point.state})", flush=True)
        ended = start(local.render(run.point.job, replace(node, port=free_port()), sys.executable))
        _keep([run])
        if ended in ENDED:
            code = ended
            break
        code = code or int(ended != 0)
    return _end(study, found, a, journals, code)


def _side_by_side(study: Study, found: list[Run], left: list[Run], a: argparse.Namespace, journals: str) -> int:
    """`--jobs` runs at a time, each one process on its share of the cores; output in LOGS/NAME/output.txt."""
    machine = this_machine()
    threads = machine.threads or max(1, machine.cores // a.jobs)
    cpu = {} if machine.gpus else {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    env = {**cpu, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    checks = _checks(found if a.check else left, 1)
    commands = {run.point.name: Command((sys.executable, "-m", "trainer", *run.point.job.train()), env) for run in left}
    if a.dry_run:
        return _print(checks, list(commands.values()))
    code = _check(checks)
    if not code and not a.check:
        of = {run.point.name: run for run in left}
        codes = start_side_by_side(commands, a.jobs, Path(a.logs), lambda name: _keep([of[name]]))
        stopped = [ended for ended in codes.values() if ended in ENDED]
        code = stopped[0] if stopped else int(any(codes.values()))
    return _end(study, found, a, journals, code)


def _checks(found: list[Run], world: int) -> list[Command]:
    """The dry check of each arm, for one seed."""
    return [check(point.job, world, sys.executable) for point in sweep.distinct_settings([run.point for run in found])]


def _check(checks: list[Command]) -> int:
    return next((code for code in map(start, checks) if code), 0)


def _print(checks: list[Command], commands: list[Command]) -> int:
    print("\n".join(command.text() for command in (*checks, *commands)))
    return 0


def _keep(found: list[Run]) -> None:
    """Keep the journals of the finished ones that are not kept yet."""
    for run in found:
        if not run.kept.is_file() and sweep.with_status(run.point).finished and run.journal.is_file():
            print(f"launch: kept {kept_journals.keep(run.journal, run.kept)}", flush=True)


def _end(study: Study, found: list[Run], a: argparse.Namespace, journals: str, code: int) -> int:
    if not a.check and not code:
        _keep(found)
    print(_table(found, study, journals))
    return code


def _table(found: list[Run], study: Study, journals: str) -> str:
    now = [run.point if run.point.finished else sweep.with_status(run.point) for run in found]
    return f"{sweep.states(now)}\npage: trilevel compare --study {study.file} --journals {journals} --out {study.name}.md"
