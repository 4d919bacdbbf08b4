"""The location of this source tree: child processes import from it, runs record its commit, hosts compare its files."""

from __future__ import annotations

import os
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]  # from trainer/storage/; the only place that counts parent folders
"""The folder of trainer/, sparsity/ and launch/; in a checkout also of configs/, constraints.txt and .git."""


def python_path() -> str:
    """PYTHONPATH for a process that runs one of our modules: this tree first, so that it also works without an installation."""
    return os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
