"""GPUs, cores and a free port of this machine, as the trainer's Python finds them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.job import LaunchError


@dataclass(frozen=True)
class Machine:
    """cores: those this process may use. threads: OMP_NUM_THREADS, where the user has set it."""

    gpus: int
    cores: int
    threads: int | None = None


def this_machine() -> Machine:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Machine(
        count_gpus(), len(os.sched_getaffinity(0)), int(threads) if re.fullmatch("[1-9][0-9]{0,5}", threads) else None
    )


def count_gpus(python: str = sys.executable) -> int:
    """GPUs that this Python's torch can use. Raises LaunchError where the machine has some and torch sees none.

    torch is imported in a child process, and only where a GPU is likely: it takes seconds to import.
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
            f"{python} cannot import torch:\n{asked.stderr[-2000:]}\nrun this with the Python of the project's environment"
        )
    found = int(asked.stdout.split()[-1])
    listed = listed_gpus()
    if listed and not found:
        raise LaunchError(
            f"this machine has {listed} GPU(s) and torch sees none: a CPU build of torch, or a driver older than its CUDA "
            "(run `trilevel doctor`); to train on the CPU, set CUDA_VISIBLE_DEVICES="
        )
    return found


def listed_gpus() -> int:
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


def random_port() -> int:
    """A port for another machine, below the kernel's ephemeral range; random, so that two jobs at once rarely collide."""
    return 20000 + secrets.randbelow(10000)
