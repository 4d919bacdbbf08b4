"""Checks of the installation: libraries, compiler, GPUs, collectives. Each returns a `Finding` of `trilevel doctor`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.storage.source_tree import SOURCE_ROOT

Status = Literal["ok", "note", "fail"]
GIB = 2**30


class Finding(NamedTuple):
    """Result of one check. ok: fine; note: a run works, with a limitation; fail: a run will not start or will fail."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def text(self) -> str:
        return f"{self.status:<5}{self.name:<14}{self.found}" + (f"  ->  {self.remedy}" if self.remedy else "")


def constraints_file() -> Path:
    """The file beside the package in a source tree; a wheel does not contain it."""
    return SOURCE_ROOT / "constraints.txt"


def versions(constraints: Path) -> list[Finding]:
    """Installed versions compared with the tested ones."""
    python = Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    if not constraints.is_file():
        found = f"not compared: no {constraints.name} beside the package (a wheel does not contain it)"
        return [python, Finding("versions", "note", found, "run doctor in a source tree")]
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(), re.MULTILINE))
    needed = _requirements()
    absent, other = [], []
    for name, version in tested.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            if _plain(name) in needed:
                absent.append(name)
            continue
        if installed.partition("+")[0] != version:  # torch 2.15.0+cu130 is 2.15.0
            other.append(f"{name} {installed} (tested {version})")
    remedy = "pip install -c constraints.txt -e ."
    if absent:
        return [python, Finding("versions", "fail", f"not installed: {', '.join(absent)}", remedy)]
    if other:
        return [python, Finding("versions", "note", f"untested versions: {', '.join(other)}", remedy)]
    return [python, Finding("versions", "ok", f"{len(tested)} libraries as tested (constraints.txt)")]


def _requirements() -> set[str]:
    """Names of required distributions; empty if the package is not installed but run from its source tree."""
    try:
        listed = metadata.requires("trilevel") or []
    except metadata.PackageNotFoundError:
        listed = []
    from packaging.requirements import Requirement  # comes with half of them

    found = [Requirement(text) for text in listed]
    return {_plain(one.name) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def compiler() -> Finding:
    """DeepSpeed builds C++ extensions on first use, which needs a compiler, Python's headers and ninja."""
    name = os.environ.get("CXX", "c++")
    remedy = "install a C++ compiler (Debian: apt-get install g++ python3-dev; conda: cxx-compiler), or set CXX"
    if shutil.which(name) is None:
        return Finding("compiler", "fail", f"{name} not found: DeepSpeed can't build its ops", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n")
        words = [name, "-std=c++17", "-I", sysconfig.get_paths()["include"], "-c", str(source), "-o", f"{folder}/try.o"]
        tried = subprocess.run(words, capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = next((line for line in tried.stderr.splitlines() if "error" in line), tried.stderr.strip()[:200])
        return Finding("compiler", "fail", f"{name} can't compile a small extension: {reason}", remedy)
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return Finding("compiler", "fail", f"{name} works, but ninja is not found", "pip install ninja")
    return Finding("compiler", "ok", f"{shutil.which(name)} and ninja")


def decoder() -> Finding:
    """Whether the loader can decode a region of a JPEG."""
    from trainer.data.augment import turbojpeg

    if (library := turbojpeg.library()) is not None:
        return Finding("TurboJPEG", "ok", f"{library._name} decodes regions of images")
    remedy = "pip install turbojpeg (Linux x86_64, Python < 3.13), or install libjpeg-turbo 3 on the system"
    return Finding("TurboJPEG", "note", "not found: images are decoded whole, at two thirds of the speed", remedy)


def devices() -> list[Finding]:
    """GPUs that torch can use, and the driver."""
    import torch

    driver, listed = _driver()
    if not torch.cuda.is_available():
        if not listed:
            return [Finding("GPUs", "ok", f"none: training runs on the CPU ({len(os.sched_getaffinity(0))} cores)")]
        found = f"the driver lists {listed}, torch {torch.__version__} finds none"
        return [Finding("GPUs", "fail", found, _why_unseen(torch.version.cuda))]
    kinds = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        kinds.append(f"{about.name} {about.total_memory / GIB:.0f} GiB (sm_{about.major}{about.minor})")
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    mixed = len(set(kinds)) > 1
    lines = [Finding("GPUs", "note" if mixed else "ok", found, "use one kind: the slowest sets the pace" if mixed else "")]
    if not torch.cuda.is_bf16_supported():
        lines.append(Finding("bfloat16", "note", "not supported by these GPUs, slow", "set engine.precision=float32"))
    return [
        *lines,
        Finding("driver", "ok", f"{driver or 'version unknown'}; torch {torch.__version__}, CUDA {torch.version.cuda}"),
    ]


def _why_unseen(built_for: str | None) -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"unset CUDA_VISIBLE_DEVICES (it is {hidden!r})"
    if built_for is None:
        return "install a CUDA build of torch (this is a CPU build)"
    return f"install a newer driver, or a torch for an older CUDA (this one is built for {built_for})"


def _driver() -> tuple[str, int]:
    """Version of the NVIDIA driver ("" if unknown) and the number of GPUs it lists."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        except subprocess.TimeoutExpired:
            return "nvidia-smi hangs", 0
        rows = done.stdout.split() if done.returncode == 0 else []
        return (rows[0], len(rows)) if rows else ("", 0)
    folder = Path("/proc/driver/nvidia/gpus")
    return "", len(list(folder.iterdir())) if folder.is_dir() else 0


def collectives() -> Finding:
    """NCCL on GPUs, gloo on CPU. gloo needs a host name that resolves, or GLOO_SOCKET_IFNAME."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    if torch.cuda.is_available():
        if dist.is_nccl_available():
            return Finding("collectives", "ok", f"NCCL {'.'.join(map(str, nccl.version()))}")
        return Finding(
            "collectives", "fail", "this torch has no NCCL: only one GPU can be used", "install an official CUDA build of torch"
        )
    if not dist.is_gloo_available():
        return Finding(
            "collectives", "fail", "this torch has no gloo: only one process can be used", "install an official build of torch"
        )
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        known = [interface for _, interface in socket.if_nameindex()]
        if name in known:
            return Finding("collectives", "ok", f"gloo over {name}")
        found = f"GLOO_SOCKET_IFNAME={name}: unknown interface"
        return Finding("collectives", "fail", found, f"set it to one of {', '.join(known)}")
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding(
            "collectives", "note", f"gloo; host name {socket.gethostname()} does not resolve", "set GLOO_SOCKET_IFNAME"
        )
    return Finding("collectives", "ok", f"gloo, {socket.gethostname()} resolves to {address}")
