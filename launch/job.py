"""A job and the command lines it becomes. Everything here is pure: text in, text out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


class LaunchError(ValueError):
    """A job that can't be started as asked; the text names the flag, the value and the way out."""


@dataclass(frozen=True)
class Job:
    """What is to be trained: a configuration file and what differs from it. Not where."""

    config: str
    overrides: tuple[str, ...] = ()
    resume: bool = False

    def __post_init__(self) -> None:
        for text in self.overrides:
            if not text.partition("=")[1] or text.startswith(("=", "-")):
                raise LaunchError(f"{text!r} is no setting: write it as key.sub=value, e.g. optim.lr=1e-3")

    def train(self, *more: str) -> tuple[str, ...]:
        """The words after `trilevel`."""
        return ("train", self.config, *self.overrides, *(("--resume",) if self.resume else ()), *more)


@dataclass(frozen=True)
class Command:
    """One process to start: its words and what it adds to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """A line for a shell that does the same."""
        env = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*(("env", *env) if env else ()), shlex.join(self.argv)])


@dataclass(frozen=True)
class Node:
    """One machine's part of a job: `processes` here, on GPUs or on CPU, `number` of `nodes`; rendezvous at address:port."""

    processes: int
    gpus: bool
    port: int
    address: str = "127.0.0.1"
    nodes: int = 1
    number: int = 0
    threads: int | None = None  # OMP_NUM_THREADS of each process; None leaves the environment's

    @property
    def world(self) -> int:
        return self.processes * self.nodes

    def env(self) -> dict[str, str]:
        """Without GPUs accelerate and DeepSpeed must be told so, or every rank believes to be alone."""
        cpu = {} if self.gpus else {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
        return cpu | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})


def node_words(job: Job, processes: int, nodes: int, number: str, address: str, port: str, python: str) -> list[str]:
    """`python -m launch node`: what a node of many is told. number, address and port may be names of a shell's variables."""
    words = [python, "-m", "launch", "node", job.config, *job.overrides, *(("--resume",) if job.resume else ())]
    words += ["--processes", str(processes), "--nodes", str(nodes)]
    return [shlex.quote(word) for word in words] + ["--number", number, "--address", address, "--port", port]


def check(job: Job, world: int, python: str) -> Command:
    """The dry check of the configuration in the world it is meant for, before anything is started or queued."""
    return Command((python, "-m", "trainer", *job.train("--check")), {"TRILEVEL_WORLD": str(world)})


def accelerate(job: Job, node: Node, python: str) -> Command:
    """`accelerate launch` of one node. Every value is given, so that no default file of the user's changes the job."""
    words = [python, "-m", "accelerate.commands.launch"]
    if node.world > 1:
        words += ["--multi_gpu"]  # torchrun's agent, for CPU processes too: `--cpu` would start one process whatever is asked
    else:
        words += ["--quiet"] if node.gpus else ["--quiet", "--cpu"]
    words += ["--num_processes", str(node.world), "--num_machines", str(node.nodes), "--machine_rank", str(node.number)]
    words += ["--main_process_ip", node.address, "--main_process_port", str(node.port)]
    words += [
        "--gpu_ids",
        "all",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--same_network",
        "--rdzv_backend",
        "static",
    ]
    return Command((*words, "-m", "trainer", *job.train()), node.env())
