"""Checks that run on another host with its Python alone: hosts.py sends this file over ssh; the host may lack the package trainer."""

import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from typing import Any


def probe(asked: dict[str, Any]) -> dict[str, Any]:
    """The findings of this host.

    asked: libraries (names), token (a file in the run directory), interfaces (names), first (the first host), ports ([host, port]
    to connect to).
    Returns time and ended (this host's clock), python, versions, code (hash of the package trainer that it would import), shared
    (whether the token is visible here), gpus, without (missing interfaces), unreachable ([host, error]), loopback (why
    gloo would bind to an address that other hosts can't reach, or "").
    """
    about: dict[str, Any] = {"time": time.time(), "python": sys.version.split()[0]}
    about["versions"] = {name: version(name) for name in asked["libraries"]}
    found = importlib.util.find_spec("trainer")
    about["code"] = code_hash(pathlib.Path(found.origin).parent) if found and found.origin else ""
    about["shared"] = os.path.exists(asked["token"])
    about["gpus"] = 0
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        about["gpus"] = sum(line.startswith("GPU ") for line in listed.splitlines())
    own = [name for _, name in socket.if_nameindex()]
    about["without"] = [name for name in asked["interfaces"] if name not in own]
    about["loopback"] = "" if about["gpus"] or asked["interfaces"] else unreachable_address(asked["first"])
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        about["unreachable"] = [failure for failure in pool.map(connect, asked["ports"]) if failure]
    about["ended"] = time.time()
    return about


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def code_hash(package: pathlib.Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def unreachable_address(first: str) -> str:
    """Why gloo, which binds to the address of the host name, could not be reached from `first`; "" if it can."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as bound:
            bound.bind((address, 0))
        alone = address.startswith("127.") and not socket.gethostbyname(first).startswith("127.")
        return f"{name} resolves to {address}" if alone else ""
    except OSError:
        return f"{name} does not resolve to an address of this host"


def connect(address: tuple[str, int]) -> tuple[str, str] | None:
    """(host, error) if a connection to a (host, port) fails."""
    host, port = address
    try:
        socket.create_connection((host.rpartition("@")[2], port), 5).close()
    except OSError as error:
        return host, str(error)
    return None
