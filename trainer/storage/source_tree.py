"""Where this source tree lies: child processes import from it, its commit names a run, hosts compare its files."""

from __future__ import annotations

import os
from pathlib import Path

import trainer

SOURCE_ROOT = Path(trainer.__file__).resolve().parent.parent
"""The folder that holds trainer/, sparsity/ and launch/; beside them, in a checkout, configs/, constraints.txt and .git."""


def python_path() -> str:
    """PYTHONPATH for a process that starts a module of ours: this tree first, so that one that nobody installed works too."""
    return os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
