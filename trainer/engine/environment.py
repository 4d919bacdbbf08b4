"""What the launcher set for this process: world size, local rank, compile cache."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config.errors import ConfigError


def use_persistent_compile_cache() -> str:
    """The folder where torch.compile's graphs outlive the process, so that a restart finds them: TORCHINDUCTOR_CACHE_DIR, else one
    of the user's for all runs (torch's own default is below /tmp, which a node's next job does not see)."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    if folder == default_cache_dir():  # torch writes its default into the environment when anything asks for it: nobody's wish
        folder = "~/.cache/trilevel/compiled"
    try:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).expanduser())
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, as in some containers
        raise ConfigError(
            f"{folder}: {getattr(error, 'strerror', error)}; name another folder for compiled graphs by TORCHINDUCTOR_CACHE_DIR"
        ) from error
    return folder


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_of_node() -> bool:
    """Whether this process does what is needed once per node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def set_single_process_env() -> None:
    """A plain `trilevel train` is a world of one: say so in the words torch.distributed reads."""
    if "WORLD_SIZE" in os.environ:
        return
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # port 0: bound where the system likes when the store opens; one asked for here could be another run's by then
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def reset_accelerate() -> None:
    """Forget accelerate's singletons, so that this process can build another Engine. The process group stays until the process ends:
    DeepSpeed keeps a reference to it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
