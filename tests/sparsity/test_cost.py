"""Multiply-adds: the published numbers, and the counter of torch on the real network."""

from functools import lru_cache

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsity.build import build
from sparsity.connections import CONNECTIONS
from sparsity.cost import cost, shape_of
from sparsity.tokens import TOKENS
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from tests.support.vits import FAMILIES, images, tiny


@lru_cache
def deit(size: str):
    with torch.device("meta"):  # shapes are all that is counted
        return timm.create_model(f"deit_{size}_patch16_224")


@lru_cache
def real_deit_small():
    return timm.create_model("deit_small_patch16_224", weight_init="skip")


def count(size: str, plan: Plan, **settings):
    return cost(shape_of(build(deit(size), **settings)), plan)


def test_deit_small_is_4_6_g():
    assert count("small", DENSE).total / 1e9 == pytest.approx(4.599, abs=5e-4)
    assert count("small", DENSE, tokens="topk", connections="shared_keys").total == count("small", DENSE).total


@pytest.mark.parametrize(("keep", "published"), [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)])
def test_evit_published(keep, published):
    assert round(count("small", Plan(keep), tokens=TopKSettings(fuse=True)).total / 1e9, 1) == published


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0.9, (177, 160, 144)), (0.8, (157, 126, 101)), (0.7, (138, 97, 68)), (0.6, (118, 71, 43)), (0.5, (98, 49, 25))],
)
def test_tokens_left(keep, left):
    found = count("small", Plan(keep), tokens="topk")
    assert found.tokens == (197,) * 4 + tuple(1 + n for n in (*[left[0]] * 3, *[left[1]] * 3, *[left[2]] * 2))
    assert found.left == 1 + left[2] and sum(found.per_block) < found.total


@pytest.mark.parametrize(
    ("keep", "saved"),
    [(0.9, (13.6, 13.3, 13.1)), (0.8, (25.6, 25.1, 24.8)), (0.7, (35.2, 34.8, 34.6)), (0.5, (50.4, 50.4, 50.4))],
)
def test_shares_saved_by_tokens(keep, saved):
    for size, percent in zip(("tiny", "small", "base"), saved, strict=True):
        share = 1 - count(size, Plan(keep), tokens="topk").total / count(size, DENSE).total
        assert 100 * share == pytest.approx(percent, abs=0.06)


def test_shares_saved_by_connections():
    """The ceiling is that of the attention alone (choosing by [CLS] row costs next to nothing), on top of r = .9 too."""
    for size, alone, on_top in (("tiny", 8.5, 5.9), ("small", 4.6, 3.2), ("base", 2.4, 1.6)):
        dense = count(size, DENSE).total
        some = count(size, Plan(1.0, 0.1), connections="shared_keys").total
        both = count(size, Plan(0.9, 0.1), tokens="topk", connections="shared_keys").total
        tokens = count(size, Plan(0.9), tokens="topk").total
        assert 100 * (1 - some / dense) == pytest.approx(alone, abs=0.06)
        assert 100 * (tokens - both) / dense == pytest.approx(on_top, abs=0.08)
        assert count(size, Plan(1.0, 0.1), connections="exact").total > dense  # saves nothing, and choosing costs


def counted(model, plan: Plan, x: torch.Tensor) -> float:
    """Multiply-adds per image as torch counts them while the network runs."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x, plan, frozenset({"kept"}))
    return counter.get_total_flops() / 2 / x.shape[0]


@pytest.mark.parametrize("connections", CONNECTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_torch_counts_the_same_on_deit_small(tokens, connections):
    model = build(real_deit_small(), tokens=tokens, connections=connections)
    plan = Plan(0.7, 0.2)
    assert counted(model, plan, torch.zeros(1, 3, 224, 224)) == pytest.approx(cost(shape_of(model), plan).total, rel=0.01)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"patch_drop"}))
@pytest.mark.parametrize("position", ["attention", "block"])
def test_torch_counts_the_same_for_every_family(family, position):
    vit = FAMILIES[family]()
    model = build(vit, tokens="topk", connections="shared_keys_column", blocks=(0, 1), position=position)
    for plan in (DENSE, Plan(0.5, 0.5)):
        assert counted(model, plan, images(vit, 1)) == pytest.approx(cost(shape_of(model), plan).total, rel=0.01)


@pytest.mark.parametrize("include", [False, True])
def test_what_the_pooling_leaves_out_is_not_counted(include):
    """Two registers more or less in the pooling are .7 % of this network."""
    vit = tiny(class_token=False, reg_tokens=2, global_pool="map", pool_include_prefix=include)
    model = build(vit, tokens="random", blocks=(0,))
    for plan in (DENSE, Plan(0.5)):
        assert counted(model, plan, images(vit, 1)) == pytest.approx(cost(shape_of(model), plan).total, rel=1e-4)


def test_a_patch_embedding_of_another_form_is_counted_from_its_operations():
    vit = tiny()
    whole = build(vit).cost().total
    vit.patch_embed.proj = torch.nn.Sequential(vit.patch_embed.proj)
    assert build(vit, tokens="random", blocks=(0,)).cost().total == whole


def test_what_cannot_be_counted_is_refused():
    vit = FAMILIES["prr_pooling"]()
    vit.attn_pool = torch.nn.Identity()
    with pytest.raises(
        ValueError, match="attn_pool is a Identity: multiply-adds are implemented for timm's AttentionPoolLatent and"
    ):
        shape_of(build(vit, tokens="random", blocks=(0,)))
