"""The number of this process on its node."""

from __future__ import annotations

import os


def local_rank() -> int:
    """0 without a launcher. With PET_VIRTUAL_LOCAL_RANK=1 (torchrun's --virtual-local-rank) each rank sees one GPU, and LOCAL_RANK, the
    number of that, is 0 in all of them."""
    if os.environ.get("PET_VIRTUAL_LOCAL_RANK") == "1":
        return int(os.environ.get("RANK", "0")) % int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_RANK", "0"))
