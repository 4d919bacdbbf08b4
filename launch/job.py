"""A job and the command lines it becomes. Everything here is pure: text in, text out."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

STOPPED = 75  # the trainer's exit code for "stopped with a checkpoint"
LATE = 76  # and for "a rank did not arrive within engine.timeout"
BUSY = 73  # for "another process writes the journal of this run"
REFUSED = 2  # for a wrong setting, broken data, a store that is gone
RESTARTS = 3  # of an elastic job, by failing ranks; nodes that come or go don't count
LAST_CALL = 15  # seconds that an elastic job waits for more nodes once it has enough
LOGS = "logs"  # the folder of all output, where no other is named
# before each line of a rank: torchrun fills it in; `rank_logs` reads it and removes the record separator, which no rank prints
PREFIX = "\x1e[rank ${rank}] "


class LaunchError(ValueError):
    """A job that can't be started as asked; the text names the flag, the value and the remedy."""


def near(word: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest valid one, else all."""
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid values: {', '.join(valid)}"


@dataclass(frozen=True)
class Job:
    """What to train: a configuration file and settings that differ from it. Not where."""

    config: str
    overrides: tuple[str, ...] = ()
    resume: bool = False

    def __post_init__(self) -> None:
        for text in self.overrides:
            if not text.partition("=")[1] or text.startswith(("=", "-")):
                raise LaunchError(f"{text!r}: not a setting; write key.sub=value, e.g. optim.lr=1e-3")

    def words(self) -> tuple[str, ...]:
        return (self.config, *self.overrides, *(("--resume",) if self.resume else ()))

    def train(self, *more: str) -> tuple[str, ...]:
        """The words after `trilevel`."""
        return ("train", *self.words(), *more)


def name_of(job: Job) -> str:
    """The run's name where it is given, else the file's; characters that a shell, a path or Slurm cannot take are replaced."""
    given = [text.partition("=")[2] for text in job.overrides if text.startswith("name=")]
    return safe_name(given[-1] if given else job.config.rpartition("/")[2].removesuffix(".yaml"))


def safe_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "run"


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
class Nodes:
    """How many machines: `most` are asked for; a job that is elastic (least < most) goes on while `least` of them are there."""

    least: int
    most: int

    @classmethod
    def read(cls, text: str) -> Nodes:
        """ "4" or "2:4". Raises LaunchError."""
        found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
        least = int(found[1]) if found else 0
        most = int(found[2] or least) if found else 0
        if not 1 <= least <= most:
            raise LaunchError(f"--nodes {text:.80}: write a number from 1 on, or MIN:MAX with MIN at most MAX, e.g. 2:4")
        return cls(least, most)

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.elastic else str(self.most)


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
    least: int | None = None  # an elastic job goes on with that many nodes; None: with all or not at all
    own_address: str | None = None  # this node's own address, by which the others reach it where its name does not resolve
    tee: str | None = None  # folder for each rank's output, whose lines then carry a rank prefix; None: output as it comes

    @property
    def world(self) -> int:
        return self.processes * self.nodes

    def env(self) -> dict[str, str]:
        """Without GPUs accelerate and DeepSpeed need these variables, or every rank trains as a world of one."""
        cpu = {} if self.gpus else {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
        prefix = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": PREFIX} if self.logged() else {}
        return cpu | prefix | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})

    def logged(self) -> list[str]:
        """Words of torchrun and of `accelerate launch`; one process alone is started by neither."""
        return [] if self.tee is None or self.world == 1 else ["--tee", "3", "--log_dir", self.tee]


def node_words(
    job: Job | str,
    processes: int,
    nodes: str,
    number: str,
    address: str,
    port: str,
    python: str,
    own_address: str = "",
    logs: str = LOGS,
) -> list[str]:
    """Words of `python -m launch node`, for one of several nodes. Numbers and addresses may be shell variables: they stay unquoted."""
    words = [job] if isinstance(job, str) else [shlex.quote(word) for word in job.words()]
    flags = ["--processes", str(processes), "--nodes", nodes, "--number", number, "--address", address, "--port", port]
    flags += ["--here", own_address] if own_address else []
    flags += ["--logs", shlex.quote(logs)] if logs != LOGS else []
    return [shlex.quote(python), "-m", "launch", "node", *words, *flags]


def check(job: Job, world: int, python: str) -> Command:
    """The dry check of the configuration in the world it is meant for, before anything starts or is queued."""
    return Command((python, "-m", "trainer", *job.train("--check")), {"TRILEVEL_WORLD": str(world)})


def launcher(job: Job, node: Node, python: str) -> Command:
    """What starts the ranks of one node: `accelerate launch`, or torchrun where nodes may come and go."""
    return accelerate(job, node, python) if node.least is None else torchrun(job, node, python)


def torchrun(job: Job, node: Node, python: str) -> Command:
    """torchrun's elastic agent of one node; `accelerate launch` knows only a fixed number of them.

    When a node is lost (or a rank fails, RESTARTS times at most) the agents start all ranks again on what is left. Only `--resume`
    brings them back to where they were, so it is always there.
    """
    words = [python, "-m", "torch.distributed.run", "--nnodes", f"{node.least}:{node.nodes}"]
    words += ["--nproc_per_node", str(node.processes), "--max_restarts", str(RESTARTS)]
    words += ["--rdzv_backend", "c10d", "--rdzv_id", name_of(job), "--rdzv_endpoint", f"{node.address}:{node.port}"]
    # torchrun would guess from the host name which node hosts the rendezvous, and under which address
    words += ["--rdzv_conf", f"is_host={int(node.number == 0)},last_call_timeout={LAST_CALL}"]
    words += ["--local_addr", node.own_address] if node.own_address else []
    words += node.logged()
    return Command((*words, "-m", "trainer", *replace(job, resume=True).train()), node.env())


def accelerate(job: Job, node: Node, python: str) -> Command:
    """`accelerate launch` of one node. Every value is given, so that no default file of the user's changes the job."""
    words = [python, "-m", "accelerate.commands.launch"]
    if node.world > 1:
        words += ["--multi_gpu"]  # torchrun's agent, for CPU processes too: `--cpu` would start one process whatever is asked
    else:
        words += ["--quiet"] if node.gpus else ["--quiet", "--cpu"]
    words += ["--num_processes", str(node.world), "--num_machines", str(node.nodes), "--machine_rank", str(node.number)]
    words += ["--main_process_ip", node.address, "--main_process_port", str(node.port)]
    words += "--gpu_ids all --mixed_precision no --dynamo_backend no --same_network --rdzv_backend static".split()
    words += node.logged()
    return Command((*words, "-m", "trainer", *job.train()), node.env())
