"""Level 4: the stored block form gives the pruned weight back to the bit, and its bytes are counted right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsity.weights.groups import Block
from sparsity.weights.magnitude import MagnitudeSettings
from sparsity.weights.projection import kept_groups, spread
from sparsity.weights.stored import packed, sizes, unpacked
from tests.sparsity.weights.test_groups import SHAPES, drawn
from tests.support.vits import tiny


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_a_pruned_weight_comes_back_to_the_bit(shape, size, axis, per):
    weight, site = drawn(*shape).float(), Block("fc", *shape, size, axis)
    kept = kept_groups([site], {"fc.weight": weight}, 0.4, per)
    masked = weight * spread([site], kept)["fc.weight"]
    parts = packed(site, masked, kept["fc"])
    assert torch.equal(unpacked(site, parts), masked)
    assert len(parts["values"]) == int((masked != 0).sum()) and parts["index"].dtype == torch.uint8
    for name, wrong in (("index", parts["index"][:-1]), ("values", parts["values"][:-1]), ("counts", parts["counts"][:-1])):
        with pytest.raises(ValueError, match=r"fc\.weight"):
            unpacked(site, parts | {name: wrong})


@pytest.mark.parametrize("forged", [
    {"index": [-1, 0, 0, 2]}, {"index": [3, 0, 0, 2]}, {"index": [1, 1, 0, 2]}, {"counts": [3, -1, 1, 1]}, {"counts": [4, 0, 0, 0]},
    {"counts": [2, 1, 1]}, {"counts": [[2, 1], [1, 0]]}, {"index": [[1], [2], [0], [2]]}, {"values": [[1.0]] * 8},
    {"counts": [2.0, 1.0, 1.0, 0.0]},
])  # fmt: skip
def test_forged_counts_and_indices_are_refused_by_name(forged: dict[str, Any]):
    """Four blocks of 2 x 3; as int16, which has negative numbers, as the files of wide blocks do."""
    site = Block("fc", 4, 6, (2, 3), 1)
    honest: dict[str, Any] = {"counts": [2, 1, 1, 0], "index": [1, 2, 0, 2], "values": [float(n) for n in range(1, 9)]}

    def read(parts: dict[str, Any]) -> torch.Tensor:
        found = {name: torch.tensor(values) for name, values in parts.items()}
        return unpacked(site, {name: value.short() if value.dtype == torch.int64 else value for name, value in found.items()})

    assert read(honest)[0].tolist() == [0, 1, 3, 5, 0, 0]
    with pytest.raises(ValueError, match=r"fc\.weight: counts and indices are not those of a layer of 4 x 6"):
        read(honest | forged)


def test_wide_blocks_have_wide_indices():
    site = Block("fc", 2, 400, (2, 300))
    weight = drawn(2, 400)
    kept = kept_groups([site], {"fc.weight": weight}, 1.0, "block")["fc"]
    parts = packed(site, weight, kept)
    assert (parts["index"].dtype, parts["counts"].tolist()) == (torch.int16, [300, 100])
    assert torch.equal(unpacked(site, parts), weight)


@pytest.mark.parametrize(("groups", "index"), [("columns", True), ("rows", True), ("units", False), ("heads", False)])
def test_bytes_are_those_of_the_arrays(groups, index):
    """A third of the heads of the tiny network, half of all others; CSR counted by torch."""
    vit = tiny()
    settings = MagnitudeSettings(keep=1 / 3 if groups == "heads" else 0.5, groups=groups, block=(4, 6), prune=0.0)
    level = settings.build(vit)
    weights = dict(vit.named_parameters())
    assert sizes(level).keys() == {"dense"}
    level.begin_epoch(0, lambda: weights)
    masks, found = level.masks(), sizes(level)
    assert found["dense"] == sum(4 * weights[name].numel() for name in masks)
    block = csr = 0
    for site in level.sites:
        if index:
            parts = packed(site, weights[site.weight].detach() * masks[site.weight], level.kept[site.name])
            block += sum(part.numel() * part.element_size() for part in parts.values())
        else:
            block += sum(4 * int(masks[name].sum()) for name in site.shapes)
    for mask in masks.values():
        if mask.ndim == 2:
            sparse = mask.float().to_sparse_csr()
            csr += 4 * (sparse.values().numel() + sparse.col_indices().numel() + sparse.crow_indices().numel())
        else:
            csr += 4 * int(mask.sum())
    assert (found["block"], found["csr"]) == (block, csr) and block < csr
    assert found["block"] < 0.7 * found["dense"]


def test_shares_are_those_of_the_masks():
    vit = tiny()
    level = MagnitudeSettings(keep=1 / 3, groups="heads", prune=0.0).build(vit)
    assert level.shares() == {}
    level.begin_epoch(0, lambda: dict(vit.named_parameters()))
    shares = level.shares()
    assert [shares[f"blocks.0.attn{part}"] for part in ("", ".qkv", ".proj")] == pytest.approx([1 / 3] * 3)
    assert "blocks.0.mlp.fc1" not in shares
