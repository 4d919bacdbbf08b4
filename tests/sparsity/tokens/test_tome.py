"""Merging: averages weighted by size, the prefix never merged, at most half, proportional attention."""

import pytest
import torch

from sparsity.build import build
from sparsity.tokens.tome import Merge, MergeSettings, merge
from sparsity.types import DENSE, QKV, Plan
from tests.sparsity.tokens.test_topk import scene
from tests.support.vits import FAMILIES, images, tiny


@pytest.mark.parametrize("p", [0, 1, 2, 3])
@pytest.mark.parametrize("r", [1, 5])
def test_nothing_is_lost(p, r):
    """The sum weighted by size is that of before, sizes add up to the patches, and the prefix stays as it was."""
    tokens, qkv = scene(3, 10, p)
    after, carried = merge(tokens, qkv, r, carry_qkv=True)
    assert after.x.shape == (3, p + 10 - r, 8) and after.ids.shape == (3, 10 - r)
    assert torch.equal(after.x[:, :p], tokens.x[:, :p]) and after.size[:, :p].eq(1).all()
    assert after.size[:, p:].sum(1).tolist() == [10.0] * 3
    assert torch.allclose((after.x * after.size[..., None]).sum(1), tokens.x.sum(1), atol=1e-5)
    for new, old in zip(carried[:3], qkv[:3], strict=True):
        assert torch.allclose((new * after.size[:, None, :, None]).sum(2), old.sum(2), atol=1e-5)
    twice, _ = merge(after, carried, 2, carry_qkv=False)
    assert torch.allclose((twice.x * twice.size[..., None]).sum(1), tokens.x.sum(1), atol=1e-5)


def test_the_most_alike_of_the_two_sets_are_merged():
    tokens, _ = scene(1, 6, p=1)
    k = torch.randn(1, 1, 7, 4)
    k[0, 0, 2] = 3 * k[0, 0, 5]  # patch 1 (set A) points where patch 4 (set B) points
    after, _ = merge(tokens, QKV(k, k, k, 0.5), 1, carry_qkv=False)
    assert after.ids.tolist() == [[3, 5, 0, 2, 4]]
    assert torch.allclose(after.x[0, -1], (tokens.x[0, 2] + tokens.x[0, 5]) / 2)
    assert after.size.tolist() == [[1, 1, 1, 1, 1, 2]]


def test_how_many():
    assert Merge(13).count(196, Plan(0.5)) == 183
    assert Merge(13).count(196, DENSE) == 196  # the plan decides when
    assert Merge().count(196, Plan(0.7)) == 138
    assert Merge().count(196, Plan(0.2)) == 98 and Merge(20).count(9, Plan(0.5)) == 5  # at most half in one block
    assert Merge(4).count(1, Plan(0.5)) == 1


def test_identical_tokens_merge_without_a_trace():
    """Proportional attention: merging copies changes nothing but rounding, as counting each as often as it was merged must."""
    vit = tiny(depth=4, drop_path_rate=0.0).eval()
    torch.nn.init.zeros_(vit.pos_embed)
    x = torch.randn(2, 3, 1, 1).expand(-1, -1, 16, 16).contiguous()
    record = build(vit, tokens="tome", blocks=(0, 1))(x, Plan(0.6), frozenset({"kept"}))
    assert record.kept[1].shape == (2, 6)
    assert torch.allclose(record.logits, vit(x), atol=1e-5)


@pytest.mark.parametrize("family", ["deit", "deit_distilled", "registers", "map_pooling", "patch_drop"])
def test_families(family):
    vit = FAMILIES[family]().train()
    model = build(vit, tokens=MergeSettings(merged=2), blocks=(0, 1))
    output = model(images(vit), Plan(0.9), frozenset({"kept"}), torch.arange(4))
    before = 9 if family == "patch_drop" else 16
    assert output.kept[1].shape == (4, before - 4) and output.logits.isfinite().all()
