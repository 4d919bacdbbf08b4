"""`python -m tests.faults.measure`: injects faults of each kind until there are ten, and appends what was found to
docs/results/faults.jsonl, a line per run; the same command goes on where it was ended. docs/results/reliability.md is made from
that file by `python -m tests.faults.kinds`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.figures import RESULTS, ROOT, injected, results
from tests.faults.injection import Findings, disturbed
from tests.faults.live_job import undisturbed
from tests.faults.places import missing
from tests.faults.random_kinds import KINDS
from trainer.data.shards.pack import pack


def until(count: int, kind: str, seed: int, file: Path, folder: Path, shards: Path, reference: Path) -> Iterator[Findings]:
    """Runs under faults of one kind until the file has `count` of them. The first seed is `seed`, the next ones follow it. The
    last one where a run ended before a fault."""
    while injected(file, kind) < count:
        print(f"{kind}: TRILEVEL_FAULTS={seed}", flush=True)
        findings = disturbed(Path(tempfile.mkdtemp(dir=folder)), shards, kind, seed, reference)
        with file.open("a") as out:
            out.write(json.dumps(findings.row() | about()) + "\n")
        yield findings
        if not findings.faults:
            return
        seed += 1


def about() -> dict[str, str]:
    """When, where and from which commit a result comes."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cores = f"{len(os.sched_getaffinity(0))} shared cores"
    return {"date": datetime.date.today().isoformat(), "commit": commit, "hardware": cores}


def judged(findings: Findings) -> str:
    """What is wrong with a run, "" where nothing is."""
    if any(fault.hang for fault in findings.faults):
        return "it hung"
    if not findings.finished:
        return "it did not finish"
    if not findings.faults:
        return "it ended before a fault"
    if findings.lost or findings.repeated:
        return f"{findings.lost} examples lost, {findings.repeated} repeated"
    if not findings.equal:
        return "it differs from the undisturbed run"
    return "" if findings.audit else "the audit fails"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, default=10, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--while-absent", type=Path, metavar="FILE", help="begin a run only while FILE does not exist")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "digits"
        pack("sklearn:digits", shards, shard_size=8_000, progress=False)  # many shards: the store is asked in every epoch
        reference = undisturbed(Path(tempfile.mkdtemp(dir=folder)), shards)
        for kind in a.kinds:
            if reason := missing(KINDS[kind].place):
                print(f"{kind}: left out, {reason}")
                continue
            seed = a.seed + 1000 * list(KINDS).index(kind) + len([row for row in results(a.out) if row["kind"] == kind])
            _quiet(a.while_absent)
            for findings in until(a.faults, kind, seed, a.out, Path(folder), shards, reference):
                print(
                    f"{kind}: {len(findings.faults)} faults, {judged(findings) or 'equal to the undisturbed run'}", flush=True
                )
                if judged(findings):
                    print(findings.output, flush=True)
                _quiet(a.while_absent)


def _quiet(file: Path | None) -> None:
    """Waits while the file exists, e.g. because another job on this machine takes times."""
    while file is not None and file.exists():
        time.sleep(1)


if __name__ == "__main__":
    main()
