"""What the hosts of a hostfile say, asked over ssh: same Python, libraries and code, clock, shared directory, ways between them.

A hostfile has one host per line, in DeepSpeed's and MPI's form (`name slots=8`); text behind # is left out. A run meets on the first
host, then gloo and NCCL connect any pair: each host listens once, and all others try to reach it.
"""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.preflight import host_probe
from trainer.preflight.installation import Finding
from trainer.run.directory import LIBRARIES
from trainer.storage.source_tree import SOURCE_ROOT

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
PATIENCE = 60.0  # seconds for all that a host is asked
PEERS = 64  # others that a host tries to reach: all in files of up to 65 hosts, then those behind it in the file, and the first
SHOWN = 8  # pairs that are named
CLOCKS = 2.0  # seconds that clocks may differ
HOST = re.compile(r"(\w[\w.-]*@)?\w[\w.-]*")  # ssh takes what begins with a dash for an option
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # `launch hosts` passes them on
# runs on every host: a door that the others knock at, until we hang up
DOOR = """
import select, socket, sys
door = socket.create_server(("", 0), backlog=128)
print(door.getsockname()[1], flush=True)
select.select([sys.stdin], [], [], {seconds})
"""


def read_hosts(hostfile: Path) -> list[str]:
    """Names in the order of the file. Raises ConfigError for a file without any, or one that names none."""
    rows = [row.partition("#")[0].split() for row in hostfile.read_text(encoding="utf-8-sig").splitlines()]
    hosts = [row[0] for row in rows if row]
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ConfigError(f"{hostfile}: {host!r} is no host; a line is `name` or `user@name slots=8`")
    if not hosts:
        raise ConfigError(f"{hostfile}: no host in it; write one per line, e.g. `node1 slots=8`")
    return hosts


def check_hosts(hostfile: Path, runs: Path, ssh_config: str | None = None) -> list[Finding]:
    """One line per host, one for the ways between them, one where numbers of GPUs differ. ssh_config: instead of ~/.ssh/config."""
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
    with ThreadPoolExecutor(PEERS) as pool:
        doors = list(pool.map(lambda host: _open_door(ssh, host), hosts))
        ports = {host: port for host, (_, port) in zip(hosts, doors, strict=True)}
        try:
            found = list(pool.map(lambda host: _ask(ssh, host, asked | {"doors": _others(host, hosts, ports)}), hosts))
        finally:
            for door, _ in doors:
                door.kill()
                if door.stdin:
                    door.stdin.close()  # the far end waits for this
                door.wait()
            token.unlink()
            if created:
                runs.rmdir()
    lines = [_line(host, about) for host, about in zip(hosts, found, strict=True)]
    lines += [_connectivity(hosts, found, ports)] if len(hosts) > 1 else []
    counts = {about["gpus"] for about in found if "gpus" in about}
    if len(counts) > 1:
        numbers = ", ".join(f"{host} {about['gpus']}" for host, about in zip(hosts, found, strict=True) if "gpus" in about)
        lines.append(Finding("hosts", "fail", f"different numbers of GPUs: {numbers}", "use hosts with the same number"))
    return lines


def _ask(ssh: tuple[str, ...], host: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a host answers, with the moments before and after; {"error": ...} where it does not."""
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
        return {"error": f"no answer within {PATIENCE:g} s", "remedy": "look at the host"}
    if done.returncode == 255:
        return {
            "error": f"ssh: {done.stderr.strip()[-200:] or 'failed'}",
            "remedy": f"let `ssh -o BatchMode=yes {host} true` work without a password",
        }
    if done.returncode:
        return {
            "error": f"{sys.executable} there: {done.stderr.strip()[-200:]}",
            "remedy": "the same environment at the same path on every host",
        }
    return json.loads(done.stdout.splitlines()[-1]) | {"before": started, "after": time.time()}


def _others(host: str, hosts: list[str], ports: dict[str, int]) -> list[tuple[str, int]]:
    """At whose doors a host knocks."""
    here = hosts.index(host)
    near = [hosts[(here + step) % len(hosts)] for step in range(1, min(len(hosts), PEERS + 1))]
    return [(other, ports[other]) for other in dict.fromkeys([hosts[0], *near]) if other != host and ports[other]]


def _connectivity(hosts: list[str], found: list[dict[str, Any]], ports: dict[str, int]) -> Finding:
    """Whether the hosts reach each other, on ports that the system chose: so do the connections of a run."""
    tried = sum(len(_others(host, hosts, ports)) for host, about in zip(hosts, found, strict=True) if "shut" in about)
    shut = [
        f"{host} can't reach {to} ({why})"
        for host, about in zip(hosts, found, strict=True)
        for to, why in about.get("shut", [])
    ]
    closed = [host for host in hosts if not ports[host]]
    if shut:
        more = f" and {len(shut) - SHOWN} more" if len(shut) > SHOWN else ""
        remedy = (
            "open all TCP ports between the hosts (a run takes free ones), or name the hosts by the network that they share"
        )
        return Finding("ports", "fail", "; ".join(shut[:SHOWN]) + more, remedy)
    if closed or not tried:
        return Finding("ports", "note", f"nobody could try to reach {', '.join(closed)}", f"repair {', '.join(closed)} first")
    return Finding("ports", "ok", f"the hosts reach each other ({tried} ways tried)")


def _line(host: str, about: dict[str, Any]) -> Finding:
    if "error" in about:
        return Finding(host, "fail", about["error"], about["remedy"])
    wrong: list[tuple[str, str]] = []
    ours = {name: host_probe.version(name) for name in LIBRARIES}
    other = [f"{name} {v} (here {ours[name]})" for name, v in about["versions"].items() if v != ours[name]]
    if other:
        wrong.append((f"other libraries: {', '.join(other)}", "the same environment on every host"))
    if not about["code"]:
        wrong.append(("the package trainer is not found", "install it there, or put it on PYTHONPATH"))
    elif about["code"] != host_probe.code_hash(SOURCE_ROOT / "trainer"):
        wrong.append(("other code than here", "the same version on every host"))
    off = max(about["ended"] - about["after"], about["before"] - about["time"])  # above 0: outside what the round trip explains
    if off > CLOCKS:
        wrong.append((f"its clock is {off:.0f} s off", "run NTP (chrony) there"))
    if not about["sees"]:
        wrong.append(("does not see the run directory", "choose a shared one by runs=DIRECTORY"))
    if about["without"]:
        wrong.append((f"has no interface {', '.join(about['without'])}", f"another name in {' or '.join(INTERFACES)}"))
    if about["meets"]:
        wrong.append((f"gloo would listen where nobody comes: {about['meets']}", "export GLOO_SOCKET_IFNAME=INTERFACE here"))
    if wrong:
        return Finding(host, "fail", "; ".join(what for what, _ in wrong), "; ".join(dict.fromkeys(how for _, how in wrong)))
    return Finding(host, "ok", f"{about['gpus']} GPU(s), same libraries and code, clock, run directory")


def _open_door(ssh: tuple[str, ...], host: str) -> tuple[subprocess.Popen[str], int]:
    """A listening port on a host while all are asked; port 0 where that failed."""
    seconds = int(PATIENCE)
    words = [*ssh, host, f"{_python()} -u -c {shlex.quote(DOOR.format(seconds=seconds))}"]
    try:
        door = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return subprocess.Popen(["true"], text=True), 0
    assert door.stdout is not None
    alarm = threading.Timer(15, door.kill)  # a host that takes the connection and says nothing
    alarm.start()
    said = door.stdout.readline().strip()
    alarm.cancel()
    return door, int(said) if said.isdigit() else 0


def _python() -> str:
    """Ours, with the path that `launch hosts` passes on."""
    path = os.environ.get("PYTHONPATH")
    return f"{f'env PYTHONPATH={shlex.quote(path)} ' if path else ''}{shlex.quote(sys.executable)}"
