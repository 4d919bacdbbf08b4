"""Where this source tree lies: child processes import from it, its commit names a run, hosts compare its files."""

from __future__ import annotations

import os
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]  # of trainer/storage/; the only place that counts folders
"""The folder that holds trainer/, sparsity/ and launch/; beside them, in a checkout, configs/, constraints.txt and .git."""


def python_path() -> str:
    """PYTHONPATH for a process that starts a module of ours: this tree first, so that one that nobody installed works too."""
    return os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
