"""Level 4: which elements are a group, which groups stay; both against loops over blocks in float64, written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsity.weights.groups import Block, Heads, Units, block_sites, head_sites, matches, unit_sites
from sparsity.weights.projection import kept_groups, spread
from sparsity.weights.pruning import chosen, sites_of
from tests.support.vits import images, tiny

SHAPES = [((8, 12), (4, 6)), ((10, 13), (4, 6)), ((3, 5), (16, 64)), ((9, 4), (2, 4)), ((7, 7), (1, 1))]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(shape: tuple[int, int], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The blocks of a matrix, row by row, as slices: the last ones are smaller."""
    return [
        (slice(r, min(r + size[0], shape[0])), slice(c, min(c + size[1], shape[1])))
        for r in range(0, shape[0], size[0])
        for c in range(0, shape[1], size[1])
    ]


def reference(weight: np.ndarray, size: tuple[int, int], keep: float, axis: int) -> np.ndarray:
    """The mask of a matrix of which each block keeps its ceil(keep x columns) best columns (axis 1) or rows (axis 0)."""
    mask = np.zeros_like(weight)
    for rows, columns in blocks_of(weight.shape, size):
        squares = (weight[rows, columns] ** 2).sum(axis=1 - axis)
        for best in sorted(range(len(squares)), key=lambda i: (-squares[i], i))[: math.ceil(len(squares) * keep)]:
            block = mask[rows, columns]
            block[(slice(None), best) if axis == 1 else (best, slice(None))] = 1.0
    return mask


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
def test_each_block_keeps_its_best_columns_or_rows(shape, size, keep, axis):
    weight, site = drawn(*shape), Block("fc", *shape, size, axis)
    mask = spread([site], kept_groups([site], {"fc.weight": weight}, keep, "block"))["fc.weight"]
    np.testing.assert_array_equal(mask.double().numpy(), reference(weight.numpy(), size, keep, axis))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_energies_are_sums_of_squares_and_spread_is_their_inverse(shape, size, axis):
    weight, site = drawn(*shape), Block("fc", *shape, size, axis)
    energy, counts = site.energy({"fc.weight": weight}), site.counts()
    found = [(weight[block] ** 2).sum(1 - axis) for block in blocks_of(shape, size)]
    for row, count, wanted in zip(energy, counts, found, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted)
        assert (count[: len(wanted)] > 0).all() and (count[len(wanted) :] == 0).all() and (row[len(wanted) :] == 0).all()
    assert counts.sum() == weight.numel(), "every element is in one group"
    numbers = torch.arange(counts.numel()).view_as(counts)
    where = site.spread(numbers)["fc.weight"]
    again = torch.zeros(counts.numel(), dtype=torch.float64).scatter_add(0, where.flatten(), weight.flatten() ** 2)
    torch.testing.assert_close(again.view_as(energy), energy)


@pytest.mark.parametrize("site", [Units("m", 6, 10), Units("m", 6, 10, False), Heads("a", 6, 3, 4), Heads("a", 6, 3, 4, False)])
def test_coupled_groups_hold_every_element_of_a_unit_or_a_head_once(site):
    weights = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(site.shapes.items())}
    energy, counts = site.energy(weights), site.counts()
    assert counts.sum() == sum(weight.numel() for weight in weights.values())
    numbers = site.spread(torch.arange(energy.numel()).view_as(energy))
    assert {name: tuple(one.shape) for name, one in numbers.items()} == site.shapes
    again = torch.zeros(energy.numel(), dtype=torch.float64)
    for name, weight in weights.items():
        again.scatter_add_(0, numbers[name].flatten(), weight.flatten() ** 2)
    torch.testing.assert_close(again.view_as(energy), energy)


@pytest.mark.parametrize("groups", ["units", "heads"])
def test_what_is_masked_adds_nothing_to_the_output(groups):
    """A masked unit or head may be cut out: whatever the other half of its weights is, the network's output is the same."""
    vit = tiny().eval()
    sites = sites_of(vit, groups, (1, 1))
    weights = dict(vit.named_parameters())
    kept = kept_groups(sites, weights, 0.5, "layer")
    masks = spread(sites, kept)
    first = ("fc1", "qkv")
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
        before = vit(images(vit))
        for name, mask in masks.items():
            if not any(part in name for part in first):
                weights[name].add_((~mask).float())  # fc2 and proj read units and heads that are 0
        torch.testing.assert_close(vit(images(vit)), before, rtol=0, atol=1e-5)


def test_one_threshold_takes_more_from_weaker_layers_and_leaves_every_layer_one_group():
    sites = [Block(name, 8, 16, (4, 8)) for name in ("strong", "weak", "weakest")]
    weights = {f"{site.name}.weight": drawn(8, 16, seed=i) * 10.0**-i for i, site in enumerate(sites)}
    total = sum(site.counts().numel() for site in sites)
    kept = kept_groups(sites, weights, 0.5, "network")
    share = [stays.double().mean().item() for stays in kept.values()]
    assert (
        share[0] == 1.0
        and 0 < share[2] <= 1 / 32
        and sum(stays.sum().item() for stays in kept.values()) in (total // 2, total // 2 + 1)
    )
    by_layer = kept_groups(sites, weights, 0.5, "layer")
    assert [stays.sum().item() for stays in by_layer.values()] == [16, 16, 16]
    for site in sites:
        energy = site.energy(weights)
        assert energy[by_layer[site.name]].min() >= energy[~by_layer[site.name]].max()
    with pytest.raises(ValueError, match=r"weights\.per='head': unknown value; valid values: block, layer, network"):
        kept_groups(sites, weights, 0.5, "head")


def test_ties_go_to_the_lower_index_and_a_half_wins_over_nothing():
    site = Block("fc", 4, 8, (2, 4))
    kept = kept_groups([site], {"fc.weight": torch.zeros(4, 8)}, 0.5, "block")["fc"]
    assert kept.tolist() == [[True, True, False, False]] * 4
    kept = kept_groups([site], {"fc.weight": torch.ones(4, 8, dtype=torch.bfloat16)}, 0.3, "block")["fc"]
    assert kept.sum(1).tolist() == [2] * 4, "ceil(4 x .3)"


def test_layers_are_chosen_by_name_or_refused_with_the_nearest():
    vit = tiny()
    depth, sites = len(vit.blocks), sites_of(vit, "columns", (16, 64))
    assert len(sites) == 4 * depth and len(unit_sites(vit)) == len(head_sites(vit)) == depth
    assert [site.name for site in chosen(sites, ["mlp.fc1", "blocks.0.attn.*"])] == [
        "blocks.0.attn.qkv", "blocks.0.attn.proj", *(f"blocks.{i}.mlp.fc1" for i in range(depth)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"weights\.layers='mlp\.fc3': fits no layer .* did you mean mlp\.fc"):
        chosen(sites, ["mlp.fc3"])
    with pytest.raises(ValueError, match=r"weights\.layers=\[\]: no layer is pruned"):
        chosen(sites, [])
    assert matches("blocks.0.mlp.fc1", "fc1") and not matches("blocks.0.mlp.fc1", "blocks.0")


def test_networks_whose_groups_depend_on_each_other_are_refused_by_name():
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 3}
    for groups, words, args in (
        ("units", "Sigmoid of blocks.0.mlp is not 0 at 0", {"act_layer": nn.Sigmoid}),
        ("heads", "blocks.0.attn normalises or gates all heads together", {"scale_attn_norm": True}),
        ("units", "blocks.0.mlp normalises its units", {"scale_mlp_norm": True}),
    ):
        with pytest.raises(ValueError, match=f"weights.groups={groups}: {words}.*set weights.groups=columns"):
            sites_of(VisionTransformer(**sizes, **args), groups, (1, 1))
    assert len(block_sites(VisionTransformer(**sizes), (4, 4), 1)) == 4
