"""`python -m tests.faults.measure SHARDS`: injects faults of each kind until there are ten, and appends what was found to
docs/results/faults.jsonl, a line per run; the same command goes on where it was ended. SHARDS: a folder that
`trilevel pack sklearn:digits` made. docs/results/reliability.md is made from that file by `python -m tests.faults.kinds`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.figures import RESULTS, ROOT, injected, results
from tests.faults.injection import KINDS, ON_OWN_DISK, Findings, disturbed
from tests.faults.live_job import undisturbed


def until(count: int, kind: str, seed: int, file: Path, folder: Path, shards: Path, reference: Path) -> Iterator[Findings]:
    """Runs under faults of one kind until the file has `count` of them. The first seed is `seed`, the next ones follow it."""
    while injected(file, kind) < count:
        print(f"{kind}: TRILEVEL_FAULTS={seed}", flush=True)
        findings = disturbed(Path(tempfile.mkdtemp(dir=folder)), shards, kind, seed, reference)
        with file.open("a") as out:
            out.write(json.dumps(findings.row() | about()) + "\n")
        yield findings
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
    return (
        ""
        if findings.equal and findings.audit
        else "it differs from the undisturbed run"
        if not findings.equal
        else "the audit fails"
    )


def may_mount() -> bool:
    """Whether a file system of its own can be mounted."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--faults", type=int, default=10, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    shards = a.shards.resolve()
    with tempfile.TemporaryDirectory() as folder:
        reference = undisturbed(Path(tempfile.mkdtemp(dir=folder)), shards)
        for kind in a.kinds:
            if kind == ON_OWN_DISK and not may_mount():
                print(f"{kind}: left out, mounting a small file system needs root")
                continue
            seed = a.seed + 1000 * list(KINDS).index(kind) + len([row for row in results(a.out) if row["kind"] == kind])
            for findings in until(a.faults, kind, seed, a.out, Path(folder), shards, reference):
                print(
                    f"{kind}: {len(findings.faults)} faults, {judged(findings) or 'equal to the undisturbed run'}", flush=True
                )
                if judged(findings):
                    print(findings.output)


if __name__ == "__main__":
    main()
