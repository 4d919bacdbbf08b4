"""Faults at random moments in a live job of two ranks: what is injected, and what the run makes of it.

`disturbed` trains one run under faults of one kind and returns its findings; tests/faults/test_random_moments.py judges them and
tests/faults/measure.py writes them down.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.conftest import environment, lines
from tests.faults.live_job import STEPS, Job, lives, newest_steps, ranks_of, recipe, started, steps_of_attempt

FAULTS, LONGEST = 5, 5.0  # faults in a run at most; longest time in s from a step of an attempt to its fault
HANG = 240.0  # s without a step or an end after a fault


@dataclass
class Fault:
    """moment: s from a step of the attempt to the fault; to_exit: s from the fault until no rank of that attempt lives (None: they lived
    on); to_step: s from the fault to the next step that is new in the journal; again: steps computed a second time."""

    moment: float
    to_exit: float | None = None
    to_step: float | None = None
    again: int = 0
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


class Kind(NamedTuple):
    """inject: returns whether there was something to hit; heal: undoes it after a while (None: nothing to undo); ends: all ranks of the
    attempt end, so that the next step is one of a new attempt; by_hand: the launcher ends too, and the test starts the job again."""

    inject: Callable[[Job, random.Random], bool]
    heal: Callable[[Job], None] | None = None
    ends: bool = True
    by_hand: bool = False


def _signalled(which: str, number: signal.Signals, **more: Any) -> Kind:
    return Kind(lambda job, chosen: job.send(which, number, chosen), **more)


def _launcher(number: signal.Signals) -> Kind:
    def inject(job: Job, chosen: random.Random) -> bool:
        job.process.send_signal(number)
        return True

    return Kind(inject, by_hand=True)


def _kill_and_damage(job: Job, chosen: random.Random) -> bool:
    """A rank is killed, and one bit of the newest checkpoint turned over: the next attempt has to take the checkpoint before."""
    there = (job.run / "checkpoints").glob
    if len(list(there("step-????????"))) < 2 or not job.send("rank 1", signal.SIGKILL, chosen):
        return False
    time.sleep(0.5)  # a write of rank 0 that is in progress, and the deletion of old checkpoints after it
    file = chosen.choice(sorted(path for path in max(there("step-????????")).iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)
    return True


def _filler(job: Job) -> Path:
    return job.folder / "runs" / "filler"


def _fill(job: Job, chosen: random.Random) -> bool:
    """The file system of `runs` has no byte left."""
    with _filler(job).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with _filler(job).open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    return True


KINDS = {
    "rank 0 killed": _signalled("rank 0", signal.SIGKILL),
    "rank 1 killed": _signalled("rank 1", signal.SIGKILL),
    "loader worker killed": _signalled("worker", signal.SIGKILL),
    "rank 1 stopped": _signalled("rank 1", signal.SIGSTOP),
    "loader worker stopped": _signalled("worker", signal.SIGSTOP),
    "launcher killed": _launcher(signal.SIGKILL),
    "SIGTERM to the launcher": _launcher(signal.SIGTERM),
    "rank 1 killed, newest checkpoint damaged": Kind(_kill_and_damage),
    "disk full for a while": Kind(_fill, heal=lambda job: _filler(job).unlink(), ends=False),
}
ON_OWN_DISK = "disk full for a while"


def disturbed(folder: Path, shards: Path, kind: str, seed: int, reference: Path) -> Findings:
    """One run in `folder` under up to FAULTS faults of one kind, the moments drawn from `seed`. "disk full" mounts a file system: root."""
    with contextlib.ExitStack() as stack:
        if kind == ON_OWN_DISK:
            stack.enter_context(_own_disk(folder))
        recipe(folder, shards)
        return _disturbed(Job(folder, started(folder)), kind, seed, reference)


def _disturbed(job: Job, kind: str, seed: int, reference: Path) -> Findings:
    chosen, findings, how, hit = random.Random(seed), Findings(kind, seed), KINDS[kind], set[int]()
    try:
        while not any(fault.hang for fault in findings.faults):
            if job.process.poll() is not None:
                if job.process.returncode == 0 or not how.by_hand:
                    break
                job.process = started(job.folder)
            time.sleep(0.1)
            attempt, steps = steps_of_attempt(job.run)
            if steps and (attempt not in hit or not how.ends) and len(findings.faults) < FAULTS:
                moment = chosen.uniform(0, LONGEST)
                time.sleep(moment)
                if job.process.poll() is None and (fault := _one(job, how, chosen, moment)) is not None:
                    hit.add(attempt)
                    findings.faults.append(fault)
    finally:
        _end(job.process)
    findings.finished = job.process.returncode == 0
    findings.output = (job.folder / "out.txt").read_text()[-6000:]
    if findings.finished:
        _judge(findings, job.run, reference)
    return findings


@contextlib.contextmanager
def _own_disk(folder: Path, size: str = "1200m") -> Iterator[None]:
    """`runs` below `folder` on a file system in memory: the launcher starts nothing below 1 GiB of free space."""
    (folder / "runs").mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder / "runs")], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder / "runs")], check=True, capture_output=True)


def _one(job: Job, how: Kind, chosen: random.Random, moment: float) -> Fault | None:
    """Injects one fault and follows it to the next step."""
    before, ranks = newest_steps(job.run), list(ranks_of(job.process).values())
    if not how.inject(job, chosen):
        return None
    fault, began = Fault(moment), time.monotonic()
    lasts = chosen.uniform(1, LONGEST) if how.heal else 0.0
    healed = how.heal is None
    at_heal = before
    while (now := time.monotonic() - began) < HANG:
        if not healed and now >= lasts and how.heal is not None:
            at_heal, healed = newest_steps(job.run), True
            how.heal(job)
        if fault.to_exit is None and not any(map(lives, ranks)):
            fault.to_exit = time.monotonic() - began
        ended = job.process.poll() is not None
        if ended and how.by_hand and fault.to_exit is not None and job.process.returncode != 0:
            job.process = started(job.folder)
            ended = False
        attempt, steps, last = newest_steps(job.run)
        if healed and steps and (attempt > before[0] or (not how.ends and last > at_heal[2])):
            fault.to_step = time.monotonic() - began
            fault.again = max(0, before[2] - _resumed_at(job.run)) if attempt > before[0] else 0
            return fault
        if ended and healed:
            return fault  # the last attempt of the run was hit after its last step, or the job gave up
        time.sleep(0.05)
    fault.hang = True
    return fault


def _resumed_at(run: Path) -> int:
    return max([0, *(line["step"] for line in lines(run, "resume")[-1:])])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leaves nothing running, stopped processes neither."""
    for one in ranks_of(process).values():
        with contextlib.suppress(psutil.Error):
            one.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


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
