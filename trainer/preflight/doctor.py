"""`trilevel doctor`: check this machine for a run; one line per check, with a remedy. Changes nothing.

With a hostfile it also checks every host over ssh (see `hosts`).
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from trainer.config.credentials import REMEDY
from trainer.preflight.installation import GIB, Finding, collectives, compiler, constraints_file, decoder, devices, versions
from trainer.storage.text import printable

NETWORKED = frozenset("nfs nfs4 lustre gpfs beegfs ceph fuse.ceph wekafs cifs smb3 9p virtiofs panfs".split())
TIMEOUT = 3.0  # seconds for a request to another machine


def doctor(
    hosts: str | Path | None = None,
    runs: str | Path = "runs",
    ssh_config: str | None = None,
    say: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Checks of this machine, which take some seconds, and of the hosts of a hostfile. say: called with each finding when it is there."""
    runs, lines = Path(runs), []

    def add(found: list[Finding]) -> None:
        lines.extend(found)
        for one in found:
            say(one)

    add(versions(constraints_file()))
    checks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "GPUs": devices,
        "collectives": collectives,
        "compiler": compiler,
        "TurboJPEG": decoder,
        "runs": lambda: file_system(runs),
        "clock": lambda: clock(runs),
        "disk": lambda: free_disk(runs),
        "shared memory": lambda: shared_memory(Path("/dev/shm")),
        "open files": open_files,
        "cores": cores,
        "MLflow": lambda: tracking(runs),
    }
    for name, check in checks.items():
        try:
            found = check()
        except ImportError as error:  # the other checks still run
            found = Finding(name, "fail", f"check failed: {error}", "pip install -c constraints.txt -e .")
        add([found] if isinstance(found, Finding) else found)
    if hosts is not None:
        from trainer.preflight.hosts import check_hosts

        add(check_hosts(Path(hosts), runs, ssh_config))
    return lines


def main(hosts: str | None = None, ssh_config: str | None = None) -> int:
    """Print the findings; returns 1 if one of them is a failure."""
    lines = doctor(hosts, ssh_config=ssh_config, say=lambda line: print(printable(line.text()), flush=True))
    failed = sum(line.status == "fail" for line in lines)
    print(f"{failed} check(s) failed" if failed else "ready to train")
    return int(bool(failed))


def file_system(runs: Path, mounts: Path = Path("/proc/mounts")) -> Finding:
    """File system of the run directories: several nodes need a shared one; sqlite needs a local one."""
    there = _existing(runs)
    best, kind = "", "unknown"
    for row in mounts.read_text().splitlines() if mounts.exists() else []:
        _, point, name, *_ = row.split()
        if there.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    shared = kind in NETWORKED
    if not os.access(there, os.W_OK):
        return Finding("runs", "fail", f"{there} is not writable", "set runs=DIRECTORY to a writable folder")
    found = f"{there} is on {kind} ({best or '?'})"
    if shared:
        return Finding("runs", "ok", f"{found}, shared between hosts")
    return Finding("runs", "ok", f"{found}, local to this host; a run on several nodes needs a shared one (runs=DIRECTORY)")


def clock(runs: Path) -> Finding:
    """This host's clock compared with the one that sets file times (the file server's, on a shared file system)."""
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(runs)) as file:
            before = time.time()
            os.utime(file.name)
            off = os.stat(file.name).st_mtime - before
    except OSError as error:
        return Finding("clock", "note", f"not compared: {error}")
    if abs(off) > 2:
        found = f"{abs(off):.0f} s {'behind' if off > 0 else 'ahead of'} the file server's"
        return Finding("clock", "note", found, "synchronise both with NTP (chrony)")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def free_disk(runs: Path, want: float = 20.0, least: float = 2.0) -> Finding:
    """want, least: GiB. A DeiT-B checkpoint with optimizer state and EMA takes 1.4 GiB, and several are kept."""
    free = shutil.disk_usage(_existing(runs)).free / GIB
    found = f"{free:.1f} GiB free for runs"
    remedy = "free disk space, set runs=DIRECTORY to another disk, or keep fewer checkpoints (checkpoint.keep=1)"
    if free < least:
        return Finding("disk", "fail", found, remedy)
    return Finding("disk", "note", found, remedy) if free < want else Finding("disk", "ok", found)


def shared_memory(path: Path, want: float = 1.0) -> Finding:
    """Loader workers pass images in shared memory; containers have 64 MiB by default. want: GiB."""
    remedy = "docker run --shm-size=24g (or --ipc=host), or data.workers=0"
    if not path.is_dir():
        return Finding("shared memory", "fail", f"{path} does not exist: loader workers can't pass images", remedy)
    free = shutil.disk_usage(path).free / GIB
    found = f"{free:.2f} GiB free in {path}"
    if free < want:
        return Finding("shared memory", "fail" if free < want / 8 else "note", found, remedy)
    return Finding("shared memory", "ok", found)


def open_files(want: int = 4096) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < want:
        remedy = f"ulimit -n {want if hard == resource.RLIM_INFINITY else min(want, hard)}"
        return Finding("open files", "note", f"at most {soft} (hard limit {hard})", remedy)
    return Finding("open files", "ok", f"up to {soft}")


def cores(load: float | None = None, count: int | None = None) -> Finding:
    """The cores that this process may use, and how busy the machine is (load average of a minute)."""
    count = len(os.sched_getaffinity(0)) if count is None else count
    load = os.getloadavg()[0] if load is None else load
    found = f"{count} for this process, load average {load:.1f}"
    if load > 0.5 * count:
        remedy = (
            "stop other work before measuring; on a CPU train with one thread per process: OMP_NUM_THREADS=1, more --processes"
        )
        return Finding("cores", "note", f"{found}: other processes take part of them, so times vary", remedy)
    return Finding("cores", "ok", found)


def tracking(runs: Path, timeout: float = TIMEOUT) -> Finding:
    """Whether MLflow is reachable. A run does not need it: `trilevel sync` uploads later what the run could not send."""
    from trainer.tracking.upload import where

    uri = where(runs / "run").uri
    if uri.startswith("sqlite"):
        found = f"{uri}; on several nodes use a server (MLFLOW_TRACKING_URI), or tracking.to=journal and trilevel sync"
        return Finding("MLflow", "ok", found)
    if not uri.startswith("http"):
        return Finding("MLflow", "note", f"{uri}: not checked (not an http server)")
    remedy = "start it (mlflow server) or unset MLFLOW_TRACKING_URI; training works without it: trilevel sync RUN later"
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout) as answer:
            return Finding("MLflow", "ok", f"{uri} answers with status {answer.status}")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            remedy = REMEDY
        return Finding("MLflow", "note", f"{uri} answers with status {error.code}", remedy)
    except OSError as error:
        return Finding("MLflow", "note", f"{uri} not reachable within {timeout:g} s: {getattr(error, 'reason', error)}", remedy)


def _existing(path: Path) -> Path:
    """The path, or the nearest parent folder that exists."""
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path
