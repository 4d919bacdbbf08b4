"""Check the hosts of a hostfile over ssh: same Python, libraries and code, clock, shared directory, connectivity.

A hostfile has one host per line, in DeepSpeed's and MPI's form (`name slots=8`); # starts a comment. A run's rendezvous is on the
first host, then gloo and NCCL connect any pair: each host opens a port, and the others try to connect to it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.preflight import host_probe
from trainer.preflight.installation import Finding
from trainer.run.directory import LIBRARIES
from trainer.storage.source_tree import SOURCE_ROOT

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
PATIENCE = 60.0  # seconds for all checks on a host
PEERS = 64  # hosts that a host tries to connect to: all of up to 65; with more, the next 64 in the file and the first
SHOWN = 8  # unreachable pairs that are listed
CLOCKS = 2.0  # allowed difference of clocks, in seconds
HOST = re.compile(r"(\w[\w.-]*@)?\w[\w.-]*")  # a leading dash would be an option of ssh
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # `launch hosts` passes them on
# runs on every host: a listening port for the others, until standard input is closed
LISTENER = """
import select, socket, sys
server = socket.create_server(("", 0), backlog=128)
print(server.getsockname()[1], flush=True)
select.select([sys.stdin], [], [], {seconds})
"""


def read_hosts(hostfile: Path) -> list[str]:
    """Host names in the order of the file. Raises ConfigError for an invalid line or a file without hosts."""
    rows = [row.partition("#")[0].split() for row in hostfile.read_text(encoding="utf-8-sig").splitlines()]
    hosts = [row[0] for row in rows if row]
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ConfigError(f"{hostfile}: invalid host {host!r}; write `name` or `user@name slots=8`")
    if not hosts:
        raise ConfigError(f"{hostfile}: no hosts; write one per line, e.g. `node1 slots=8`")
    return hosts


def check_hosts(hostfile: Path, runs: Path, ssh_config: str | None = None) -> list[Finding]:
    """One finding per host, one for connectivity, one if the numbers of GPUs differ. ssh_config: used instead of ~/.ssh/config."""
    ssh = (*SSH, *(("-F", ssh_config) if ssh_config else ()))
    try:
        hosts = read_hosts(hostfile)
    except (OSError, ValueError) as error:
        return [Finding("hosts", "fail", str(error), "give a file with one host per line")]
    runs = runs.resolve()
    created = not runs.exists()
    token = runs / f".doctor-{uuid.uuid4().hex}"
    runs.mkdir(parents=True, exist_ok=True)
    token.touch()
    asked = {"libraries": LIBRARIES, "token": str(token), "first": hosts[0].rpartition("@")[2]}
    asked["interfaces"] = [name for key in INTERFACES for name in os.environ.get(key, "").split(",") if name.isidentifier()]
    with ThreadPool(PEERS) as pool:  # daemon threads: Ctrl-C does not wait for a host that does not answer
        listeners: list[tuple[subprocess.Popen[str], int]] = []
        try:
            listeners += pool.imap(lambda host: _start_listener(ssh, host), hosts)
            ports = {host: port for host, (_, port) in zip(hosts, listeners, strict=True)}
            found = list(pool.imap(lambda host: _ask(ssh, host, asked | {"ports": _others(host, hosts, ports)}), hosts))
        finally:
            for listener, _ in listeners:
                listener.kill()
                if listener.stdin:
                    listener.stdin.close()  # ends the process on the other host
                listener.wait()
            token.unlink()
            if created:
                with contextlib.suppress(OSError):  # another process may use it by now
                    runs.rmdir()
    lines = [_line(host, about) for host, about in zip(hosts, found, strict=True)]
    lines += [_connectivity(hosts, found, ports)] if len(hosts) > 1 else []
    counts = {about["gpus"] for about in found if "gpus" in about}
    if len(counts) > 1:
        numbers = ", ".join(f"{host} {about['gpus']}" for host, about in zip(hosts, found, strict=True) if "gpus" in about)
        lines.append(Finding("hosts", "fail", f"different numbers of GPUs: {numbers}", "use hosts with the same number"))
    return lines


def _ask(ssh: tuple[str, ...], host: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A host's answer, with the times before and after; {"error": ..., "remedy": ...} if it failed."""
    started = time.time()
    try:
        done = subprocess.run(
            [*ssh, host, f"{_python()} -"],
            input=f"{inspect.getsource(host_probe)}\nimport json\nprint(json.dumps(probe(json.loads({json.dumps(asked)!r}))))\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    except FileNotFoundError:
        return {"error": "ssh is not installed here", "remedy": "install openssh-client"}
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PATIENCE:g} s", "remedy": "check that the host is up and responsive"}
    if done.returncode == 255:
        return {
            "error": f"ssh: {done.stderr.strip()[-200:] or 'failed'}",
            "remedy": f"set up ssh keys so that `ssh -o BatchMode=yes {host} true` works",
        }
    if done.returncode:
        return {
            "error": f"{sys.executable} failed on this host: {done.stderr.strip()[-200:]}",
            "remedy": "install the same environment at the same path on every host",
        }
    return json.loads(done.stdout.splitlines()[-1]) | {"before": started, "after": time.time()}


def _others(host: str, hosts: list[str], ports: dict[str, int]) -> list[tuple[str, int]]:
    """(host, port) of the others that a host tries to connect to."""
    here = hosts.index(host)
    near = [hosts[(here + step) % len(hosts)] for step in range(1, min(len(hosts), PEERS + 1))]
    return [(other, ports[other]) for other in dict.fromkeys([hosts[0], *near]) if other != host and ports[other]]


def _connectivity(hosts: list[str], found: list[dict[str, Any]], ports: dict[str, int]) -> Finding:
    """Whether the hosts reach each other on free ports chosen by the system, which a run uses too."""
    tried = sum(len(_others(host, hosts, ports)) for host, about in zip(hosts, found, strict=True) if "unreachable" in about)
    unreachable = [
        f"{host} can't reach {to} ({why})"
        for host, about in zip(hosts, found, strict=True)
        for to, why in about.get("unreachable", [])
    ]
    closed = [host for host in hosts if not ports[host]]
    if unreachable:
        more = f" and {len(unreachable) - SHOWN} more" if len(unreachable) > SHOWN else ""
        remedy = "open all TCP ports between the hosts (a run uses free ones), or use host names of the network that they share"
        return Finding("ports", "fail", "; ".join(unreachable[:SHOWN]) + more, remedy)
    if closed or not tried:
        return Finding("ports", "note", f"connectivity to {', '.join(closed)} was not tested", "fix the failures above first")
    return Finding("ports", "ok", f"the hosts reach each other ({tried} connections tested)")


def _line(host: str, about: dict[str, Any]) -> Finding:
    if "error" in about:
        return Finding(host, "fail", about["error"], about["remedy"])
    wrong: list[tuple[str, str]] = []
    ours = {name: host_probe.version(name) for name in LIBRARIES}
    other = [f"{name} {v} (here {ours[name]})" for name, v in about["versions"].items() if v != ours[name]]
    if other:
        wrong.append((f"different libraries: {', '.join(other)}", "install the same environment on every host"))
    if not about["code"]:
        wrong.append(("package trainer not found", "install it on the host, or add it to PYTHONPATH"))
    elif about["code"] != host_probe.code_hash(SOURCE_ROOT / "trainer"):
        wrong.append(("code differs from this host", "install the same version on every host"))
    off = max(about["ended"] - about["after"], about["before"] - about["time"])  # above 0: more than the round trip explains
    if off > CLOCKS:
        wrong.append((f"clock is {off:.0f} s off", "run NTP (chrony) on the host"))
    if not about["shared"]:
        wrong.append(("run directory not visible", "set runs=DIRECTORY to a shared folder"))
    if about["without"]:
        wrong.append((f"no interface {', '.join(about['without'])}", f"set {' or '.join(INTERFACES)} to an existing one"))
    if about["loopback"]:
        text = f"gloo would bind to a loopback address that other hosts cannot reach: {about['loopback']}"
        wrong.append((text, "export GLOO_SOCKET_IFNAME=INTERFACE here"))
    if wrong:
        return Finding(host, "fail", "; ".join(what for what, _ in wrong), "; ".join(dict.fromkeys(how for _, how in wrong)))
    return Finding(host, "ok", f"{about['gpus']} GPU(s), same libraries and code, clock, run directory")


def _start_listener(ssh: tuple[str, ...], host: str) -> tuple[subprocess.Popen[str], int]:
    """A process that keeps a port open on a host during the checks, and the port; 0 if that failed."""
    seconds = int(PATIENCE)
    words = [*ssh, host, f"{_python()} -u -c {shlex.quote(LISTENER.format(seconds=seconds))}"]
    try:
        listener = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return subprocess.Popen(["true"], text=True), 0
    assert listener.stdout is not None
    alarm = threading.Timer(15, listener.kill)  # a host may accept the connection and never answer
    alarm.daemon = True
    alarm.start()
    answer = listener.stdout.readline().strip()
    alarm.cancel()
    return listener, int(answer) if re.fullmatch("[0-9]{1,5}", answer) else 0


def _python() -> str:
    """The command of this Python, with the PYTHONPATH that `launch hosts` passes on."""
    path = os.environ.get("PYTHONPATH")
    return f"{f'env PYTHONPATH={shlex.quote(path)} ' if path else ''}{shlex.quote(sys.executable)}"
