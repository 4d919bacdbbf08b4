"""Python's cyclic garbage collector during a run: it goes through new objects only.

After the imports, the network and its graphs a process holds half a million objects that live until its end. A full collection goes through
all of them: .45 to .9 s on a CPU core, at another step on each rank, and every rank waits for the slowest. gc.freeze excludes what is alive
from later collections; reference counts still free all of it that is in no cycle.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_objects_collected() -> Iterator[None]:
    """Inside the context; behind it the collector goes through everything again, because a notebook or a test goes on."""
    gc.freeze()  # without a collection: it would take as long as the one that is avoided
    try:
        yield
    finally:
        gc.unfreeze()


def collect_and_freeze() -> None:
    """Call it between two epochs: collects what is new and garbage, and excludes what is new and alive."""
    gc.collect()
    gc.freeze()
