"""The kept lists of a run: which examples each epoch showed, so that any batch can be rebuilt and every batch audited.

RUN/kept/HASH.npz holds the packed bits of a selection and its weights where it has any. HASH is the selection's own hash, which
the journal's `epoch` lines carry: equal selections share a file (a method that changes nothing writes one), attempts can't
overwrite each other's, and a file that was touched no longer has its name. An ImageNet list is 160 kB before compression.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsity.examples.curriculum import selection_hash
from sparsity.types import Selection
from trainer.config.errors import TrilevelError
from trainer.storage.disk import atomic_write
from trainer.storage.npz import HEADER, read_npz

FOLDER = "kept"


class KeptError(TrilevelError, ValueError):
    """A kept list that is missing or was changed; the message names the file and the remedy."""


def path_of(run: Path | str, name: str) -> Path:
    return Path(run) / FOLDER / f"{name}.npz"


def write(run: Path | str, selection: Selection) -> Path:
    """Write the list of a selection, unless it is there. Raises OSError (a full disk) and leaves no half file."""
    path = path_of(run, selection.facts["hash"])
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = {} if selection.weight is None else {"weight": selection.weight}
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, keep=selection.keep, **weight)
    return path


def read(run: Path | str, name: str, num_examples: int) -> Selection:
    """The selection with this hash. Raises KeptError: missing, unreadable, of another data set, or not the one of that name."""
    path = path_of(run, name)
    if not path.is_file():
        raise KeptError(f"kept list {path} is missing: copy the folder {FOLDER}/ of the run too")
    most = -(-num_examples // 8) + 8 * num_examples + 2 * HEADER  # bits, and weights of at most 8 bytes
    try:
        arrays = read_npz(path, most, ("keep", "weight"))
        keep, weight = arrays["keep"], arrays.get("weight")
    except (OSError, ValueError, KeyError) as error:
        raise KeptError(f"kept list {path} can't be read ({error}): restore it from a copy of the run") from error
    if (
        keep.dtype != np.uint8
        or keep.shape != (-(-num_examples // 8),)
        or (weight is not None and weight.shape != (num_examples,))
    ):
        raise KeptError(f"kept list {path} does not fit {num_examples} examples: set data.train to the shards of the run")
    if selection_hash(keep, weight) != name:
        raise KeptError(f"kept list {path} was changed: its hash differs from its name; restore it from a copy of the run")
    return Selection(keep, int(np.bitwise_count(keep).sum()), weight, {"hash": name})
