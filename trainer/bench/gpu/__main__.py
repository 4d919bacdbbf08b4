"""`python -m trainer.bench.gpu PART ...`, or `make gpu PART="PART ..." OUT=FOLDER LIMIT=SECONDS`: a line per row as soon as it is known.

The most telling part first: facts, check, run, resume, step, loop, engine, profile, input, sparse, study. Without a GPU the CPU is compared
with itself in the smallest form, which tests this code and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.bench.gpu import check, facts, processes
from trainer.bench.gpu.report import Host, Part, Row, record, run

TO_END = 30.0  # seconds after its limit in which the process of a part must end
LIMIT = 235.0  # seconds of a part, so that it fits a booking of four minutes


def parts() -> dict[str, Part]:
    """By name, in the order in which they tell most."""

    def later(module: str, function: str = "part") -> Part:
        """Imported when the part begins: a host without pydantic still runs the others."""

        def part(host: Host) -> Iterator[Row]:
            import importlib

            return getattr(importlib.import_module(f"trainer.bench.gpu.{module}"), function)(host)

        return part

    return {
        "facts": facts.part, "check": check.part, "run": later("jobs", "run"), "resume": later("jobs", "resume"),
        "step": later("step"), "loop": later("loop"), "engine": later("jobs", "engine"),
        "profile": later("kernels"), "input": later("jobs", "images"), "sparse": later("semi_structured"),
        "study": later("study"),
    }  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """0, or 1 if a row failed."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m trainer.bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(known)} (default: check)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="append every row to FOLDER/gpu.jsonl")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="of each part, 0: none (default: %(default)s)"
    )
    parser.add_argument("--here", action="store_true", help="in this process; else on a GPU each part has a process of its own")
    given = parser.parse_args(words)
    if unknown := [name for name in given.parts if name not in known]:
        parser.error(f"PART={' '.join(unknown)}: unknown value; valid values: {', '.join(known)}")
    # one for the rows of this process, the runs and the benchmarks that it starts: the engine would take this folder, torch another
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/trilevel/compiled"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = Host(device, device.type != "cuda", given.out)
    if host.tiny:
        print("no CUDA device: the CPU in the smallest form, compared with itself; times mean nothing", flush=True)
    names = given.parts or ["check"]
    if host.on_gpu and not given.here:
        return int(sum(_apart(name, given.out, given.limit) for name in names) > 0)
    chosen = {name: known[name] for name in names}
    return int(run(chosen, host, lambda line: print(line, flush=True), given.limit) > 0)


def _apart(part: str, out: Path | None, limit: float) -> bool:
    """Whether a part failed in a process of its own: an error that breaks the CUDA context, and a kernel that never ends, end with it."""
    words = ["--here", part, "--limit", str(limit), *(["--out", str(out)] if out else [])]
    code = processes.shown([sys.executable, "-m", "trainer.bench.gpu", *words], os.environ, limit + TO_END if limit else 0.0)
    if code not in (0, 1):
        host = Host(torch.device("cuda"), False, out)
        record(
            part,
            "(part)",
            {"ok": False, "error": f"its process ended with {code}; rows behind the last one were not measured"},
            host,
        )
    return code != 0


if __name__ == "__main__":
    sys.exit(main())
