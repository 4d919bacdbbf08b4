"""`python -m launch slurm`: a batch script with one `launch node` per node; the nodes meet on the first of the job's list.

Slurm's signal before the limit reaches the ranks, which save and end with 75; the script then puts the job back into the queue, and
`--resume` goes on from the checkpoint (it starts where there is none).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from launch.job import Job, LaunchError, node_words

STOPPED = 75  # the trainer's exit code for "stopped with a checkpoint"
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm. processes: per node. gpus: per node, 0 for a CPU job. signal: seconds before the limit."""

    nodes: int
    processes: int
    gpus: int = 0
    cpus: int | None = None  # per process
    time: str | None = None
    signal: int = 300
    requeue: bool = True
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    output: str = "slurm-%j.txt"
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # lines of shell before anything else
    extra: tuple[str, ...] = ()  # verbatim #SBATCH options
    container: str | None = None
    runtime: str = "apptainer"

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--processes", self.processes)):
            if value < 1:
                raise LaunchError(f"{name} {value}: at least 1")
        if self.gpus and self.gpus != self.processes:
            raise LaunchError(
                f"--gpus {self.gpus} with --processes {self.processes}: a GPU has one process; leave --processes out"
            )
        if self.time is not None and not TIME.fullmatch(self.time):
            raise LaunchError(f"--time {self.time}: Slurm reads minutes, H:M:S or D-H:M:S, e.g. 1-00:00:00")
        if self.runtime not in ("apptainer", "pyxis"):
            raise LaunchError(f"--runtime {self.runtime}: apptainer or pyxis")
        for line in self.extra:
            if not line.startswith("-"):
                raise LaunchError(f"--sbatch {line!r}: an option as in `#SBATCH {line}` begins with a dash")


def render(job: Job, request: Request, python: str) -> str:
    """The text of the batch script."""
    r = request
    options = [
        f"--job-name={_name(job)}",
        f"--nodes={r.nodes}",
        "--ntasks-per-node=1",
        f"--output={r.output}",
        "--open-mode=append",
    ]
    options += [f"--gpus-per-node={r.gpus}"] if r.gpus else []
    options += [f"--cpus-per-task={r.cpus * r.processes}"] if r.cpus else []
    options += [
        f"--{name}={value}" for name in ("time", "account", "partition", "qos", "constraint") if (value := getattr(r, name))
    ]
    options += [f"--signal=USR1@{r.signal}"] if r.time else []
    options += ["--requeue"] if r.requeue else ["--no-requeue"]
    options += r.extra
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines += [*(f"module load {shlex.quote(name)}" for name in r.modules), *r.setup]
    lines += [
        'address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "export address port",
    ]
    resumed = replace(job, resume=True) if r.requeue else job
    inner = " ".join(node_words(resumed, r.processes, r.nodes, '"$SLURM_NODEID"', '"$address"', '"$port"', python))
    container = []
    if r.container and r.runtime == "pyxis":
        container = [
            f"--container-image={shlex.quote(r.container)}",
            '--container-mounts="$PWD:$PWD"',
            '--container-workdir="$PWD"',
        ]
    elif r.container:
        inner = f'apptainer exec {"--nv " if r.gpus else ""}--bind "$PWD" --pwd "$PWD" {shlex.quote(r.container)} {inner}'
    cpus = [f"--cpus-per-task={r.cpus * r.processes}"] if r.cpus else []  # srun no longer takes it from the job
    lines += [" ".join(["srun", "--kill-on-bad-exit=1", *cpus, *container, "bash", "-c", shlex.quote(inner)])]
    lines += ["code=$?"]
    if r.requeue:
        lines += [f'if [ "$code" -eq {STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi']
    return "\n".join([*lines, 'exit "$code"', ""])


def _name(job: Job) -> str:
    """The run's name where it is given, else the file's; what a shell or Slurm would trip over is left out."""
    given = [text.partition("=")[2] for text in job.overrides if text.startswith("name=")]
    found = given[-1] if given else job.config.rpartition("/")[2].removesuffix(".yaml")
    return re.sub(r"[^\w.-]", "_", found)
