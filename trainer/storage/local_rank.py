"""The number of this process on its node."""

from __future__ import annotations

import os

from trainer.config.errors import ConfigError


def local_rank() -> int:
    """0 without a launcher. With PET_VIRTUAL_LOCAL_RANK=1 each rank sees one GPU, and LOCAL_RANK, the number of that, is 0 in all of them;
    then nothing that torchrun exports gives the number on the node, except the global one where each node has as many ranks. Raises
    ConfigError where that is not so: of unequal nodes at least one sees it."""
    number, nodes = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("GROUP_WORLD_SIZE")
    if os.environ.get("PET_VIRTUAL_LOCAL_RANK") != "1" or number or nodes is None:
        return number
    here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if int(nodes) * here != world:
        raise ConfigError(
            f"PET_VIRTUAL_LOCAL_RANK=1 needs as many processes on every node, but this one has LOCAL_WORLD_SIZE={here} of "
            f"WORLD_SIZE={world} on {nodes} nodes; start as many on each, or unset PET_VIRTUAL_LOCAL_RANK"
        )
    return int(os.environ["RANK"]) % here
