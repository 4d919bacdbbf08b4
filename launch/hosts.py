"""`python -m launch hosts`: one `launch node` on each host of a hostfile, over ssh. The first host is the rendezvous.

`ssh -tt` gives the far end a terminal: Ctrl-C written into ssh reaches the node, and when ssh dies the node gets SIGHUP.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.job import LOGS, Command, Job, LaunchError, Nodes, node_words

SSH = ("ssh", "-tt", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
# variables of this shell that a node needs; no credentials: other users can read a command line
PASSED = (
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH",
    "PET_VIRTUAL_LOCAL_RANK", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MLFLOW_TRACKING_URI",
)  # fmt: skip
NAME = re.compile(r"(\w[\w.-]*@)?\w[\w.-]*")  # ssh takes what begins with a dash for an option
SLOTS = re.compile(r"[1-9][0-9]{0,4}")  # \d also takes digits of other scripts, and int() fails at 4300 digits


@dataclass(frozen=True)
class Host:
    name: str
    slots: int | None = None  # processes, where the file gives it

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]


def read(text: str, source: str = "hostfile") -> list[Host]:
    """Hosts in the order of the text: `name [slots=N]` per line, # begins a comment. Raises LaunchError with the line."""
    hosts: list[Host] = []
    listed: set[str] = set()
    for number, row in enumerate(text.splitlines(), 1):
        name, *rest = row.partition("#")[0].split() or [""]
        if not name:
            continue
        if not NAME.fullmatch(name):
            raise LaunchError(f"{source}, line {number}: {name!r}: not a host name; a line is `name` or `user@name slots=8`")
        slots = None
        for word in rest:
            key, _, value = word.partition("=")
            if key != "slots" or not SLOTS.fullmatch(value):
                raise LaunchError(f"{source}, line {number}: {word!r:.80}: unknown; a line is `name` or `name slots=8`")
            slots = int(value)
        host = Host(name, slots)
        if host.address in listed:
            raise LaunchError(f"{source}, line {number}: {host.address} is listed twice; list it once, with slots=N")
        hosts.append(host)
        listed.add(host.address)
    if not hosts:
        raise LaunchError(f"{source}: no hosts; write one per line, e.g. `node1 slots=8`")
    return hosts


def processes_of(hosts: list[Host], asked: int | None) -> int:
    """Processes per node, the same on all. Raises LaunchError where neither file nor flag gives it, or they disagree."""
    slots = {host.slots for host in hosts if host.slots is not None}
    if asked is not None:
        if asked < 1:
            raise LaunchError(f"--processes {asked}: at least 1")
        slots.add(asked)
    if len(slots) != 1:
        found = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
        raise LaunchError(
            f"processes per node must be the same on all hosts, got {sorted(slots) or 'none'} ({found}, --processes {asked}): every "
            "node takes the same share of a batch; set slots=N in the hostfile, or --processes N"
        )
    return slots.pop()


def chosen(hosts: list[Host], nodes: str | None) -> tuple[list[Host], Nodes]:
    """The hosts of a job and how many of them it needs: the first N of the file, or all. Raises LaunchError for more than there are."""
    asked = Nodes.read(nodes) if nodes else Nodes(len(hosts), len(hosts))
    if asked.most > len(hosts):
        raise LaunchError(f"--nodes {nodes}: the hostfile has {len(hosts)} host(s); add hosts, or use at most {len(hosts)}")
    return hosts[: asked.most], asked


def healthy(hosts: list[Host], nodes: Nodes, ask: Callable[[list[Host]], dict[str, str]]) -> list[Host]:
    """The hosts of an attempt: the first of the file that can be used; those that cannot are reported, and replaced by later ones of the
    file. [] if fewer than `nodes.least` are left. ask: why hosts can't be used, by name."""
    taken, left = [], list(hosts)
    while left and len(taken) < nodes.most:
        some, left = left[: nodes.most - len(taken)], left[nodes.most - len(taken) :]
        wrong = ask(some)
        taken += [host for host in some if host.name not in wrong]
        for name, why in wrong.items():
            print(f"launch: {name} is left out: {why}", file=sys.stderr)
    return taken if len(taken) >= nodes.least else []


def holds_credential(name: str, value: str) -> bool:
    """Whether a variable may not stand on a command line: http://user:password@host, or a query such as ?token=..."""
    return "@" in value or (name == "MLFLOW_TRACKING_URI" and "?" in value)


def render(
    job: Job, hosts: list[Host], nodes: Nodes, processes: int, port: int, python: str, directory: Path, env: dict[str, str],
    ssh_config: str | None = None, logs: str = LOGS,
) -> list[Command]:  # fmt: skip
    """One ssh per host, in the order of the file; `env` is this shell's, of which what a node needs is passed on."""
    commands = []
    for number, host in enumerate(hosts):
        here = host.address if nodes.elastic else ""
        words = node_words(job, processes, str(nodes), str(number), hosts[0].address, str(port), python, here, logs)
        commands.append(_on_host(host, words, directory, env, ssh_config, SSH))
    return commands


def health_checks(
    hosts: list[Host], runs: Path, python: str, directory: Path, env: dict[str, str], ssh_config: str | None = None
) -> dict[str, Command]:
    """The check of each host, see `health`, by its name. runs: directory of the run."""
    words = [shlex.quote(python), "-m", "launch.health", shlex.quote(str(runs))]
    plain = (SSH[0], *SSH[2:])  # without a terminal, which would mix both streams
    return {host.name: _on_host(host, words, directory, env, ssh_config, plain) for host in hosts}


def _on_host(
    host: Host, words: list[str], directory: Path, env: dict[str, str], ssh_config: str | None, ssh: tuple[str, ...]
) -> Command:
    """A command line on a host, in the same folder, with the variables of this shell that it needs."""
    known = {name: env[name] for name in PASSED if name in env and not holds_credential(name, env[name])}
    known = {"TERM": "dumb"} | known  # the output goes to files: no live line
    set_env = ["env", *(f"{name}={shlex.quote(value)}" for name, value in known.items())]
    line = f"cd {shlex.quote(str(directory))} && exec {' '.join([*set_env, *words])}"
    return Command((*ssh, *(("-F", ssh_config) if ssh_config else ()), host.name, line))
