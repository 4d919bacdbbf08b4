"""Environment variables of this process: world size, local rank, compile cache."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config.errors import ConfigError
from trainer.engine.compile_once import share_compiling, why_apart
from trainer.engine.graph_cache import cache_whole_graphs
from trainer.storage.local_rank import local_rank

LOOPBACK = "lo"
ONE_GPU = "PET_VIRTUAL_LOCAL_RANK=1 in the environment of the launcher gives each its own, and one compiles for all"


def use_persistent_compile_cache(limit: float, attention_backend: str = "torch") -> str:
    """Keep torch.compile's graphs for later processes in TORCHINDUCTOR_CACHE_DIR, else in ~/.cache/trilevel/compiled (torch's own
    default is below /tmp, which the next job of a node may not share). Returns the folder. Where the ranks of a node can use the same
    code, one of them compiles it (limit: see `share_compiling`), or a warning in their logs says why each compiles for itself.
    attention_backend: see `cache_whole_graphs`."""
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    cache_whole_graphs(attention_backend)
    # the key of a graph contains the number of its GPU (torch 2.15): ranks have the same one only if each of them sees one GPU
    cached = inductor.fx_graph_cache and not inductor.force_disable_caches  # without, ranks would compile one after the other
    several = ranks_of_node() > 1 and cached
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 1
    apart = "" if not several else why_apart() if gpus == 1 else f"each has {gpus} GPUs to choose from; {ONE_GPU}"
    shared = several and not apart
    if apart:
        warnings.warn(f"each rank of this node compiles every graph: {apart}", stacklevel=2)
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ and not shared:
        # each rank would start a compiler per core of the node
        inductor.compile_threads = max(1, min(inductor.compile_threads or 1, (os.cpu_count() or 1) // ranks_of_node()))
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    if folder == default_cache_dir():  # torch itself sets the variable to its default: not the user's choice
        folder = "~/.cache/trilevel/compiled"
    try:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).expanduser())
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, as in some containers
        raise ConfigError(
            f"{folder}: {getattr(error, 'strerror', error)}; set TORCHINDUCTOR_CACHE_DIR to a writable folder for compiled graphs"
        ) from error
    if shared:
        share_compiling(folder, limit)
    return folder


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_node() -> int:
    """Number of processes of this run on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def use_device_of_rank() -> None:
    """Make this rank's GPU the current one, for threads that start before the engine (the loader's, which pins memory): all ranks of
    a node would open a context on the first GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def use_expandable_segments(cuda_graphs: bool) -> None:
    """Let torch's CUDA allocator grow its segments, before the first allocation: plans change the shapes, and segments of the shapes before
    would stay reserved beside the new ones. The user's variable decides where there is one. Not with CUDA graphs, which have hung with
    it (pytorch/torchtitan#3306)."""
    chosen = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if torch.cuda.is_available() and not chosen and not cuda_graphs:
        # not by the variable: torch 2.9.1 ignores the new name, and the old one warns (pytorch#183387)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def is_first_of_node() -> bool:
    """Whether this process has local rank 0 and does the work needed once per node."""
    return local_rank() == 0


def set_single_process_env() -> None:
    """Without a launcher, set torch.distributed's variables for one process."""
    if "WORLD_SIZE" in os.environ:
        return
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # port 0: the system chooses a free port when the store opens; one chosen here could be taken by then
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_alone(backend: str) -> None:
    """The process group of a world of one, before accelerate and DeepSpeed look for one: with its store in this process. torch's default
    is a TCP store that listens on all interfaces, without authentication, and takes pickles. gloo listens on loopback alone."""
    if world_size() != 1 or dist.is_initialized():
        return
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if before is None and LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def reset_accelerate() -> None:
    """Reset accelerate's singletons, so that this process can create another Engine. The process group stays until the process exits:
    DeepSpeed keeps a reference to it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
