"""Where a disturbed job runs: on this machine, on a disk of its own, over a store, between two hosts, with a clock that can be set.

Each place is a context of (folder, shards) that gives the started `Job` and takes down what it needed. `missing` tells why a place cannot
be had on a machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.faults.live_job import SETTINGS, Job, children, recipe, started
from tests.support import network_namespaces
from tests.support.http_server import serving
from tests.support.network_namespaces import hosts
from tests.support.wall_clock import built, jumping

Place = Callable[[Path, Path], contextlib.AbstractContextManager[Job]]
DISK = "1700M"  # the launcher starts nothing below 1 GiB of free space
CACHE = 0.003  # GiB: less than the shards, so that each epoch reads the store


@contextlib.contextmanager
def local(folder: Path, shards: Path) -> Iterator[Job]:
    recipe(folder, shards)
    yield Job(folder, lambda: started(folder), children)


@contextlib.contextmanager
def own_disk(folder: Path, shards: Path) -> Iterator[Job]:
    """`runs` is an ext4 of its own; job.at: its Disk."""
    disk = Disk(folder / "disk.img", folder / "runs")
    disk.make()
    try:
        recipe(folder, shards)
        yield Job(folder, lambda: started(folder), children, disk)
    finally:
        disk.remove()


class Disk:
    """An ext4 in a file, mounted at `folder`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder

    def make(self) -> None:
        self.folder.mkdir()
        run("truncate", "-s", DISK, str(self.image))
        run("mkfs.ext4", "-q", "-m", "0", str(self.image))
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.folder))

    def fail(self) -> None:
        """As after an error of the device: the file system becomes read-only at once, what was not written yet is lost."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.folder)], capture_output=True, check=False)

    def repair(self) -> None:
        """Unmounted, checked, mounted again. Raises CalledProcessError while a process has files open there."""
        run("umount", str(self.folder))
        subprocess.run(["fsck.ext4", "-y", str(self.image)], capture_output=True, check=False)  # 1: it corrected something
        self.mount()

    def freeze(self) -> None:
        """From now on every write waits."""
        run("fsfreeze", "--freeze", str(self.folder))

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", str(self.folder)], capture_output=True, check=False)

    def remove(self) -> None:
        self.thaw()
        run("umount", "-l", str(self.folder))
        self.image.unlink()


@contextlib.contextmanager
def over_http(folder: Path, shards: Path) -> Iterator[Job]:
    """Shards are behind a web server; job.at: the server, whose `hook` answers all requests while it is set."""
    with serving(shards) as web:
        indexes = folder / "indexes"
        indexes.mkdir()
        names = {
            split: f"{split}-{{000000..{len(list(shards.glob(f'{split}-*.tar'))) - 1:06d}}}.tar"
            for split in ("train", "validation")
        }
        for name in names.values():
            words = [
                sys.executable,
                "-m",
                "trainer",
                "index",
                f"{web.url}/{name}",
                "--index",
                str(indexes),
                "--cache",
                str(folder / "once"),
            ]
            run(*words, cwd=folder)
        recipe(folder, web.url)
        text = (folder / "job.yaml").read_text()
        for split, name in names.items():
            text = text.replace(f"{web.url}/{split}-*.tar", f"{web.url}/{name}")
        more = f"index: {indexes}, cache: {folder / 'cache'}, cache_size: {CACHE},"
        (folder / "job.yaml").write_text(text.replace("data: {", "data: {" + more))
        yield Job(folder, lambda: started(folder), children, web)


@contextlib.contextmanager
def between_hosts(folder: Path, shards: Path) -> Iterator[Job]:
    """A rank on each of two hosts (network namespaces with an sshd), under `launch hosts`; job.at: the hosts."""
    with hosts(2, folder) as made:
        recipe(folder, shards)
        reported = ["--hostfile", str(made.hostfile()), "--ssh-config", str(made.ssh_config)]
        words = ["-m", "launch", "hosts", "job.yaml", *SETTINGS, *reported, "--resume", "--restarts", "20"]

        def start() -> subprocess.Popen[bytes]:
            with (folder / "out.txt").open("ab") as out:
                return subprocess.Popen(
                    made.command(sys.executable, *words), cwd=folder, env=made.env(), stdout=out, stderr=subprocess.STDOUT
                )

        def below(_: subprocess.Popen[Any]) -> list[psutil.Process]:
            return [one for host in range(2) for one in made.running(host, "trainer")]

        yield Job(folder, start, below, made)


@contextlib.contextmanager
def with_clock(folder: Path, shards: Path) -> Iterator[Job]:
    """The wall clock of the job is a day late while the file job.at exists."""
    recipe(folder, shards)
    library = built(folder)
    assert library is not None, missing(with_clock)
    mark = folder / "jump"
    yield Job(folder, lambda: started(folder, jumping(library, mark, -86_400)), children, mark)


def missing(place: Place) -> str:
    """Why a place cannot be had here; "" where it can."""
    if place is own_disk:
        if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            return "mounting a file system needs root"
        absent = [name for name in ("mkfs.ext4", "fsck.ext4", "fsfreeze") if shutil.which(name) is None]
        return f"{', '.join(absent)} not installed (Debian: apt-get install e2fsprogs util-linux)" if absent else ""
    if place is between_hosts:
        return network_namespaces.missing()
    if place is with_clock and not (shutil.which("cc") or shutil.which("gcc")):
        return "no C compiler (Debian: apt-get install gcc)"
    return ""


def run(*words: str, **more: Any) -> None:
    """Raises CalledProcessError with what the command printed."""
    done = subprocess.run(words, capture_output=True, text=True, **more)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
