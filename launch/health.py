"""A short check of each node before an attempt: GPUs and their rate of matrix products, disk of the run directory, clock.

`python -m launch.health RUNS` prints the findings of one node as JSON; `judge` compares nodes. What is checked is what changes under a
job of weeks: a GPU that falls off the bus or is throttled, a full or read-only disk, a clock without NTP, a host that is down. What is
wrong from the start, such as other libraries or closed ports, is found by `trilevel doctor --hosts`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from launch.job import Command
from launch.machine import listed_gpus

PATIENCE = 120.0  # s for the answer of a node: on a busy file system the import of torch takes a minute
FREE = 1 << 30  # bytes on the disk of the run directory: less than that holds no checkpoint with its temporary copy
CLOCKS = 60.0  # s between a node's clock and ours; stores refuse signed requests that are minutes off
SLOW = 0.7  # of the usual rate of GPUs of the same kind, which differ by a few percent
AT_ONCE = 64  # nodes that are asked at the same time
# bf16 products of 8192 x 8192 on every GPU that torch sees: its kind, and TFLOP/s, the best of several rounds
RATES = """
import json, time, torch
def rate(device):
    a = torch.full((8192, 8192), 0.5, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 8192**3 / best / 1e12
print(json.dumps([[torch.cuda.get_device_name(one), rate(f"cuda:{one}")] for one in range(torch.cuda.device_count())]))
"""


def probe(runs: Path, rates: bool = True) -> dict[str, Any]:
    """The findings of this node: time (its clock); off (s by which it differs from that of the file server of `runs`; 0 on a local disk);
    free (bytes), disk (why the disk of `runs` can't be used, or ""); rates (kind and TFLOP/s of each GPU; without `rates` not measured,
    which takes the seconds of an import of torch), gpus (why they can't be used, or "")."""
    there = runs.absolute()
    while not there.is_dir():
        there = there.parent
    found: dict[str, Any] = {"free": 0, "disk": "", "rates": [], "gpus": "", "off": 0.0}
    try:
        found["free"] = shutil.disk_usage(there).free
        with tempfile.NamedTemporaryFile(dir=there, prefix=".health-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            found["off"] = abs(time.time() - os.stat(file.name).st_mtime)
    except OSError as error:
        found["disk"] = f"{there}: {error.strerror}"
    if rates and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and listed_gpus():
        done = subprocess.run([sys.executable, "-c", RATES], capture_output=True, text=True, check=False)
        if done.returncode:
            found["gpus"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][-300:]
        else:
            found["rates"] = json.loads(done.stdout.splitlines()[-1])
    return found | {"time": time.time()}


def ask(commands: Mapping[str, Command]) -> dict[str, dict[str, Any]]:
    """The findings of each node, by name, with before and after (our clock); {"error": text} where none came."""

    def one(command: Command) -> dict[str, Any]:
        before = time.time()
        try:
            done = subprocess.run(
                command.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
            )
            row = done.stdout.splitlines()[-1] if done.stdout.strip() else ""
            return json.loads(row) | {"before": before, "after": time.time()}
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {PATIENCE:g} s"}
        except (ValueError, TypeError):
            text = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            return {"error": f"exit code {done.returncode}: {text[-300:]}"}

    with ThreadPool(min(AT_ONCE, max(1, len(commands)))) as pool:
        return dict(zip(commands, pool.map(one, commands.values()), strict=True))


def judge(found: Mapping[str, dict[str, Any]], processes: int, gpus: bool = False) -> dict[str, str]:
    """Why a node can't be used, by name; without those that can. processes: of each node, one per GPU where any node has GPUs, or where
    the job needs them (`gpus`)."""
    rates: dict[str, list[float]] = {}
    for about in found.values():
        for kind, rate in about.get("rates", ()):
            rates.setdefault(kind, []).append(rate)
    # of two nodes one may be slow as a whole, which the median would hide
    usual = {kind: sorted(some)[3 * len(some) // 4] for kind, some in rates.items()}
    return {
        name: "; ".join(why)
        for name, about in found.items()
        if (why := _faults(about, processes if rates or gpus else 0, usual))
    }


def _faults(about: dict[str, Any], gpus: int, usual: dict[str, float]) -> list[str]:
    """gpus: that the node must have. usual: upper quartile of the rates of all GPUs of a kind, TFLOP/s."""
    if "error" in about:
        return [about["error"]]
    why = [about["disk"]] if about["disk"] else []
    if about["free"] < FREE and not about["disk"]:
        why.append(
            f"{about['free'] / 2**30:.2f} GiB free for the run directory, at least {FREE / 2**30:g} are needed: free disk space"
        )
    if about["gpus"]:
        why.append(f"GPUs fail: {about['gpus']}")
    elif len(about["rates"]) < gpus:
        why.append(f"{len(about['rates'])} of {gpus} GPUs visible (nvidia-smi, dmesg)")
    for number, (kind, rate) in enumerate(about["rates"]):
        if rate < SLOW * usual[kind]:
            why.append(
                f"GPU {number} reaches {rate:.3g} TFLOP/s, others of its kind {usual[kind]:.3g} (throttled, or used by another job; to "
                "use it all the same: --no-health)"
            )
    if about["off"] > CLOCKS:
        why.append(f"its clock is {about['off']:.0f} s off that of the run directory's file server: run NTP (chrony)")
    if "before" in about and (off := max(about["time"] - about["after"], about["before"] - about["time"])) > CLOCKS:
        why.append(f"its clock is {off:.0f} s off: run NTP (chrony)")
    return why


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]))))
