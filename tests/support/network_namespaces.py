"""Hosts for tests: Linux network namespaces on one bridge, each with its address and an sshd; nothing of this machine's network is touched.

The launcher is started in a namespace of its own ("login") that holds the bridge. Everything ends with the context: what still
runs in a namespace is killed, then the namespace is taken down.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import environment, wait_for

SSHD = "/usr/sbin/sshd"
INTERFACE = "eth0"  # in every host; gloo needs it, because this machine's name has no address in there
NET = "10.77.13."


def missing() -> str:
    """Why namespaces can't be had here; "" where they can."""
    if os.geteuid() != 0:
        return "not root: network namespaces can't be made"
    for name in ("ip", "ssh", "ssh-keygen", "setpriv", SSHD):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: apt-get install iproute2 openssh-client openssh-server util-linux)"
    probe = f"tl-{secrets.token_hex(4)}"
    tries = (
        ("ip", "netns", "add", probe),
        ("ip", "-n", probe, "link", "add", "dev", "bridge0", "type", "bridge"),
        ("ip", "-n", probe, "link", "add", "dev", "port0", "type", "veth", "peer", "name", "port1"),
        ("ip", "netns", "exec", probe, "true"),
    )
    try:
        for words in tries:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"`{' '.join(words)}` is refused here: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


@dataclass(frozen=True)
class Hosts:
    folder: Path
    login: str  # namespace of the launcher
    names: tuple[str, ...]  # namespaces of the hosts
    ssh_config: Path

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{NET}{number}" for number in range(1, 1 + len(self.names)))

    def hostfile(self, slots: int = 1) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses))
        return path

    def command(self, *words: str) -> list[str]:
        """A command on the login host."""
        return ["ip", "netns", "exec", self.login, *words]

    def env(self, **more: str) -> dict[str, str]:
        return environment(GLOO_SOCKET_IFNAME=INTERFACE, **more)

    def running(self, host: int, word: str = "") -> list[psutil.Process]:
        """Processes of a host whose command line has `word` in it; sshd itself is left out."""
        found = []
        for pid in _pids(self.names[host]):
            try:
                process = psutil.Process(pid)
                words = process.cmdline()
            except psutil.Error:
                continue
            if words and "sshd" not in words[0] and any(word in part for part in words):
                found.append(process)
        return found


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """`count` hosts with root's sshd by key, known to each other; skips the test visibly where that can't be."""
    if reason := missing():
        pytest.skip(reason)
    mark = f"tl-{secrets.token_hex(3)}"
    made = Hosts(folder, f"{mark}-login", tuple(f"{mark}-{n}" for n in range(1, 1 + count)), folder / "ssh_config")
    _keys(made)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _wire(made)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it locks up what is not logged in yet
        for name, address in zip(made.names, made.addresses, strict=True):
            daemons.append(_sshd(folder, name, address))
        for address in made.addresses:
            knock = made.command("ssh", "-F", str(made.ssh_config), "-o", "BatchMode=yes", address, "true")
            try:
                wait_for(lambda words=knock: subprocess.run(words, capture_output=True, check=False).returncode == 0, 120)
            except AssertionError:  # plain ssh, nothing of ours yet
                logs = "".join(path.read_text() for path in folder.glob("sshd-*.txt"))
                pytest.skip(f"sshd can't be reached in a namespace here: {logs[-500:]}")
        yield made
    finally:
        for name in (made.login, *made.names):
            for pid in _pids(name):
                _kill(pid)
        for daemon in daemons:
            daemon.wait(30)
        for name in (made.login, *made.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _kill(pid: int) -> None:
    try:
        psutil.Process(pid).kill()
    except psutil.Error:
        return


def _pids(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def _wire(made: Hosts) -> None:
    """A bridge in the login namespace with a cable to each host."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for name in (made.login, *made.names):
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("-n", made.login, "link", "add", "bridge0", "type", "bridge")
    ip("-n", made.login, "addr", "add", f"{NET}254/24", "dev", "bridge0")
    ip("-n", made.login, "link", "set", "bridge0", "up")
    for number, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
        ip("-n", made.login, "link", "add", f"port{number}", "type", "veth", "peer", "name", INTERFACE, "netns", name)
        ip("-n", made.login, "link", "set", f"port{number}", "master", "bridge0", "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        ip("-n", name, "link", "set", INTERFACE, "up")


def _keys(made: Hosts) -> None:
    """A key of the hosts and one of the user; known_hosts lists the hosts, so ssh asks nothing and checks every key."""
    for name in ("host", "user"):
        key = made.folder / f"{name}_key"
        if key.exists():  # more hosts in the same folder
            continue
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, capture_output=True)
    public = (made.folder / "host_key.pub").read_text()
    (made.folder / "known_hosts").write_text("".join(f"{address} {public}" for address in made.addresses))
    made.ssh_config.write_text(
        f"Host *\n  User root\n  IdentityFile {made.folder}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {made.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n"
    )


def _sshd(folder: Path, name: str, address: str) -> subprocess.Popen[bytes]:
    config = folder / f"sshd_config-{name}"
    config.write_text(
        f"Port 22\nListenAddress {address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nPrintMotd no\nMaxStartups 100\n"
    )
    words = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name, SSHD, "-D", "-e", "-f", str(config)]
    with (folder / f"sshd-{name}.txt").open("wb") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
