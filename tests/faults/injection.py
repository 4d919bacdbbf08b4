"""Faults at random moments in a live job of two ranks: what is injected, and what the run makes of it.

`disturbed` trains one run under faults of one kind and returns its findings; tests/faults/test_random_moments.py judges them and
tests/faults/measure.py writes them down.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import environment, lines
from tests.faults.live_job import STEPS, Job, lives, newest_steps, steps_of_attempt
from tests.faults.random_kinds import KINDS, Kind

FAULTS, LONGEST = 5, 5.0  # faults in a run at most; longest time in s from a step of an attempt to its fault
HANG = 240.0  # s without a step or an end after a fault


@dataclass
class Fault:
    """moment: s from a step of the attempt to the fault; to_exit: s from the fault until no rank of that attempt lives (None: they lived
    on); to_step: s from the fault to the next step that is new in the journal; again: steps computed a second time; typed: how often the
    command was typed again."""

    moment: float
    to_exit: float | None = None
    to_step: float | None = None
    again: int = 0
    typed: int = 0
    hang: bool = False


@dataclass
class Findings:
    """Of one run: lost and repeated count examples of the surviving lineage against the undisturbed run."""

    kind: str
    seed: int
    faults: list[Fault] = field(default_factory=list)
    finished: bool = False
    equal: bool = False
    lost: int = 0
    repeated: int = 0
    audit: bool = False
    blocking: list[float] = field(default_factory=list)  # s that saves held training
    by_cause: dict[str, float] = field(default_factory=dict)
    output: str = ""

    def row(self) -> dict[str, Any]:
        """For a file of results: no output, rounded."""
        row = asdict(self)
        row.pop("output")
        row["blocking"] = [round(value, 4) for value in self.blocking]
        row["by_cause"] = {cause: round(value, 2) for cause, value in self.by_cause.items()}
        row["faults"] = [{k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(one).items()} for one in self.faults]
        return row


def disturbed(folder: Path, shards: Path, kind: str, seed: int, reference: Path) -> Findings:
    """One run in `folder` under up to FAULTS faults of one kind, the moments drawn from `seed`. See `places.missing` first."""
    how, findings = KINDS[kind], Findings(kind, seed)
    with how.place(folder, shards) as job:
        try:
            _inject_all(job, how, random.Random(seed), findings)
        finally:
            job.end()
        findings.finished = job.process.returncode == 0
        findings.output = (folder / "out.txt").read_text()[-6000:]
        if findings.finished:
            _judge(findings, job.run, reference)
    return findings


def _inject_all(job: Job, how: Kind, chosen: random.Random, findings: Findings) -> None:
    hit = set[int]()  # attempts
    while not any(fault.hang for fault in findings.faults):
        if job.process.poll() is not None:
            if job.process.returncode == 0 or not how.by_hand:
                return
            job.process = job.start()
        time.sleep(0.1)
        attempt, steps = steps_of_attempt(job.run)
        if steps and (attempt not in hit or not how.ends) and len(findings.faults) < FAULTS:
            moment = chosen.uniform(0, LONGEST)
            time.sleep(moment)
            if job.process.poll() is None and (fault := _one(job, how, chosen, moment)) is not None:
                hit.add(attempt)
                findings.faults.append(fault)


def _one(job: Job, how: Kind, chosen: random.Random, moment: float) -> Fault | None:
    """Injects one fault and follows it to the next step."""
    before, ranks = newest_steps(job.run), list(job.ranks().values())
    if not how.inject(job, chosen):
        return None
    fault, began = Fault(moment), time.monotonic()
    heals = chosen.uniform(*how.lasts) if how.heal else 0.0
    at_heal = before
    while (now := time.monotonic() - began) < HANG:
        if how.heal and heals and now >= heals:
            at_heal, heals = newest_steps(job.run), 0.0
            how.heal(job)
        if fault.to_exit is None and not any(map(lives, ranks)):
            fault.to_exit = time.monotonic() - began
        if job.process.poll() is not None and not heals:
            if not how.by_hand or job.process.returncode == 0:
                return fault  # the last attempt was hit after its last step, or the job gave up
            if fault.to_exit is not None:
                job.process = job.start()
                fault.typed += 1
        attempt, steps, last = newest_steps(job.run)
        if not heals and steps and (attempt > before[0] or (not how.ends and last > at_heal[2])):
            fault.to_step = time.monotonic() - began
            fault.again = max(0, before[2] - _resumed_at(job.run)) if attempt > before[0] else 0
            return fault
        time.sleep(0.05)
    fault.hang = True
    return fault


def _resumed_at(run: Path) -> int:
    return max([0, *(line["step"] for line in lines(run, "resume")[-1:])])


def _judge(findings: Findings, run: Path, reference: Path) -> None:
    ours, theirs = lines(run, "step"), lines(reference, "step")
    counted = [line["step"] for line in ours]
    batch = round(lines(reference, "end")[-1]["images"] / max(1, len(theirs)))
    findings.lost = batch * len(set(range(1, STEPS + 1)) - set(counted))
    findings.repeated = batch * (len(counted) - len(set(counted)))
    findings.equal = all(
        [line[name] for line in lines(run, of)] == [line[name] for line in lines(reference, of)]
        for name, of in (("chain", "step"), ("loss", "step"), ("top1", "eval"))
    )
    findings.blocking = [line["blocking"] for line in lines(run, "checkpoint")]
    findings.by_cause = lines(run, "end")[-1].get("by_cause", {})
    audit = [sys.executable, "-m", "trainer", "audit", str(run)]
    findings.audit = subprocess.run(audit, cwd=run.parent, env=environment(), capture_output=True, timeout=600).returncode == 0
