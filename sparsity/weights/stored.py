"""Pruned layers stored small: of every block which groups are kept, and their values; bytes beside dense and CSR.

A layer cut into p x q blocks is three arrays: `counts`, groups kept in each block, blocks row by row; `index`, their positions in
the block; `values`, the groups one after the other, a column its (at most p) values, a row its (at most q). Units and heads need no
index: the kept part of their layers is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning

PARTS = ("counts", "index", "values")
POINTER = 4  # bytes of an index of CSR: int32, as in torch and scipy


def packed(site: Block, weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """counts, index and values of a weight (O, I); kept: (blocks, groups) bool. Pruned groups are not stored."""
    groups = kept.shape[1]
    return {
        "counts": kept.sum(1).to(_smallest(groups)),
        "index": kept.nonzero()[:, 1].to(_smallest(groups - 1)),
        "values": _by_group(site, weight)[_elements(site, kept)],
    }


def unpacked(site: Block, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight (O, I), 0 where nothing is stored. Raises ValueError for parts that do not fit the layer."""
    rows, p, columns, q = site.grid
    groups = q if site.axis == 1 else p
    counts, index, values = (parts[name] for name in PARTS)
    wrong = ValueError(f"{site.weight}: counts and indices are not those of a layer of {site.outputs} x {site.inputs}")
    if counts.shape != (rows * columns,) or index.ndim != 1 or values.ndim != 1:
        raise wrong
    if any(part.is_floating_point() or not _within(part, most) for part, most in ((counts, groups), (index, groups - 1))):
        raise wrong
    counts, index = counts.long(), index.long()
    if int(counts.sum()) != len(index):
        raise wrong
    kept = torch.zeros(rows * columns, groups, dtype=torch.bool)
    kept[torch.arange(len(counts)).repeat_interleave(counts), index] = True
    if not torch.equal(kept.sum(1), counts):  # an index of a block stands twice
        raise wrong
    there = _elements(site, kept)
    if int(there.sum()) != len(values):
        raise ValueError(f"{site.weight}: {len(values)} values are stored, its groups have {int(there.sum())}")
    whole = torch.zeros(there.shape, dtype=values.dtype)
    whole[there] = values
    by_row = whole.permute(0, 3, 1, 2) if site.axis == 1 else whole.permute(0, 2, 1, 3)  # -> (R, p, C, q)
    return by_row.reshape(rows * p, columns * q)[: site.outputs, : site.inputs].contiguous()


def sizes(level: Pruning) -> dict[str, int]:
    """Bytes of the pruned parameters in float32: dense, in this form (`block`), and as CSR with int32 indices. Before groups are
    pruned, dense alone."""
    found = sizes_by_layer(level).values()
    return {form: sum(one[form] for one in found) for form in ("dense", *(("block", "csr") if level.kept is not None else ()))}


def sizes_by_layer(level: Pruning) -> dict[str, dict[str, int]]:
    """The same of each layer, by the name of its site."""
    masks, found = level.masks(), {}
    for site in level.sites:
        found[site.name] = {"dense": sum(4 * prod(shape) for shape in site.shapes.values())}
        if level.kept is None:
            continue
        block = csr = 0
        if isinstance(site, Block):
            kept = level.kept[site.name]
            groups = kept.shape[1]
            block += len(kept) * _bytes(_smallest(groups)) + int(kept.sum()) * _bytes(_smallest(groups - 1))
        for name, shape in site.shapes.items():
            elements = int(masks[name].sum())
            block += 4 * elements
            csr += (4 + POINTER) * elements + POINTER * (shape[0] + 1) if len(shape) == 2 else 4 * elements
        found[site.name] |= {"block": block, "csr": csr}
    return found


def _by_group(site: Block, weight: Tensor) -> Tensor:
    """(O, I) -> (R, C, groups, elements of a group), padded."""
    blocks = site.blocks(weight)  # (R, p, C, q)
    return blocks.permute(0, 2, 3, 1) if site.axis == 1 else blocks.permute(0, 2, 1, 3)


def _elements(site: Block, kept: Tensor) -> Tensor:
    """Where `_by_group` has a stored element: of a kept group, and no padding."""
    rows, _, columns, _ = site.grid
    there = _by_group(site, torch.ones(site.outputs, site.inputs, dtype=torch.bool))
    return there & kept.view(rows, columns, -1, 1).to(there.device)


def _within(part: Tensor, most: int) -> bool:
    """Whether all numbers are 0 to `most`."""
    return not len(part) or (int(part.min()) >= 0 and int(part.max()) <= most)


def _smallest(most: int) -> torch.dtype:
    """The narrowest integer that holds 0 to `most`."""
    return torch.uint8 if most < 256 else torch.int16 if most < 2**15 else torch.int32


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
