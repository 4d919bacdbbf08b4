"""Level 3: exactly m keys for every query or image, the prefix sees all, and what is hidden is hidden."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import attention
from sparsity.build import build
from sparsity.connections.exact_mask import ExactMask
from sparsity.connections.shared_keys import SharedKeys
from sparsity.types import DENSE, QKV, ConnectAll, Plan, Tokens, VisibleKeys
from tests.sparsity.tokens.test_topk import scene
from tests.support.vits import images, tiny


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), p=st.integers(0, 3), keep=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_every_patch_row_has_exactly_m_keys(n, p, keep, seed):
    tokens, qkv = scene(2, n, p, seed)
    m = math.ceil(n * keep)
    keys = ExactMask()(tokens, qkv, Plan(1.0, keep)).keys
    if m == n:
        assert keys is None
        return
    mask = keys.mask[:, 0]
    assert mask.shape == (2, p + n, p + n)
    assert (mask[:, p:, p:].sum(-1) == m).all() and mask[:, :p].all() and mask[:, :, :p].all()


def test_ties_keep_the_lower_keys_and_the_authors_keep_them_all():
    tokens, qkv = scene(1, 6)
    flat = QKV(qkv.q * 0, qkv.k, qkv.v, qkv.scale)  # every key alike
    ours = ExactMask()(tokens, flat, Plan(1.0, 0.5)).keys.mask[0, 0, 1:, 1:]
    assert torch.equal(ours, torch.tensor([True, True, True, False, False, False]).expand(6, -1))
    assert ExactMask(authors=True)(tokens, flat, Plan(1.0, 0.5)).keys.mask.all()


def test_exact_keeps_the_largest_of_the_head_mean():
    tokens, qkv = scene(2, 8)
    mean = (qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale).softmax(-1).mean(1)[:, 1:, 1:]
    mask = ExactMask()(tokens, qkv, Plan(1.0, 0.25)).keys.mask[:, 0, 1:, 1:]
    assert (mean.masked_fill(~mask, 1).amin(-1) >= mean.masked_fill(mask, 0).amax(-1)).all()


@pytest.mark.parametrize("by", ["column", "cls"])
def test_shared_keys_are_those_with_the_largest_scores(by):
    tokens, qkv = scene(2, 9, p=2)
    mean = (qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale).softmax(-1).mean(1)
    value = mean[:, 0, 2:] if by == "cls" else mean[:, 2:, 2:].mean(1)
    index = SharedKeys(by)(tokens, qkv, Plan(1.0, 0.4)).keys.index
    assert index.shape == (2, 2 + 4) and index[:, :2].tolist() == [[0, 1]] * 2
    assert torch.equal(index[:, 2:] - 2, value.topk(4).indices.sort().values)


@pytest.mark.parametrize("connect", [ConnectAll(), ExactMask(), SharedKeys("column"), SharedKeys("cls")])
def test_all_kept_hides_nothing(connect):
    tokens, qkv = scene()
    assert connect(tokens, qkv, DENSE).keys is None


def attend(keys: VisibleKeys | None, fused: bool, size=None):
    torch.manual_seed(0)
    block = tiny(depth=1).eval().blocks[0].attn
    block.fused_attn = fused
    x = torch.randn(2, 17, 24)
    tokens = Tokens(x, torch.arange(16).expand(2, -1), 1, size, keys)
    return attention.fused(block, x, tokens)[0], attention.project_qkv(block, x), block


@pytest.mark.parametrize("size", [None, torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) + 1])
def test_hidden_keys_are_hidden_and_gathered_keys_equal_masked_ones(size):
    index = torch.tensor([[0, 3, 7, 8], [0, 1, 2, 16]])
    mask = torch.zeros(2, 1, 17, 17, dtype=torch.bool).scatter(-1, index[:, None, None].expand(-1, -1, 17, -1), True)
    out, qkv, block = attend(VisibleKeys(mask=mask), True, size)
    logits = qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale + (0 if size is None else size.log()[:, None, None])
    expected = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ qkv.v
    assert torch.allclose(out, block.proj(expected.transpose(1, 2).reshape(2, 17, 24)), atol=1e-5)
    for other in (
        attend(VisibleKeys(index=index), True, size),
        attend(VisibleKeys(mask=mask), False, size),
        attend(VisibleKeys(index=index), False, size),
    ):
        assert torch.allclose(out, other[0], atol=1e-5)


def test_keys_hold_from_one_selection_to_the_next():
    """Blocks after the selection obey it, those before don't: gradients of hidden keys are zero there and only there."""
    vit = tiny(depth=4, drop_path_rate=0.0).train()
    x = images(vit)
    seen_by = {}
    for block in (0, 2):
        model = build(vit, connections="exact", blocks=(block,))
        output = model(x, Plan(1.0, 0.2), frozenset({"keys"}))
        seen_by[block] = output.logits
        assert list(output.keys) == [block] and output.keys[block].mask[:, 0, 1:, 1:].sum(-1).eq(4).all()
    assert not torch.allclose(seen_by[0], seen_by[2], atol=1e-3)
    last = build(vit, connections="exact", blocks=(3,))(x, Plan(1.0, 0.2)).logits
    assert torch.equal(last, vit(x))  # no patch query is left


def test_shared_keys_are_all_that_is_computed_and_learnt_from():
    tokens, qkv = scene(2, 8)
    leaves = [t.clone().requires_grad_() for t in qkv[:3]]
    index = torch.tensor([[0, 2, 3], [0, 1, 8]])
    k, v, mask = attention.visible(QKV(*leaves, qkv.scale), tokens.with_(keys=VisibleKeys(index=index)))
    assert k.shape == v.shape == (2, 2, 3, 4) and mask is None
    torch.nn.functional.scaled_dot_product_attention(leaves[0], k, v).square().sum().backward()
    for leaf in leaves[1:]:
        learnt = leaf.grad.abs().sum((1, 3)).gt(0)  # (B, T)
        assert torch.equal(learnt, torch.zeros_like(learnt).scatter(1, index, True))


def test_the_authors_softmax_keeps_a_hidden_key_at_epsilon():
    torch.manual_seed(0)
    block = tiny(depth=1).eval().blocks[0].attn
    x = torch.randn(1, 17, 24)
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    mask[..., 5:, 5] = False
    tokens = Tokens(x, torch.arange(16)[None], 1, keys=VisibleKeys(mask=mask))
    _, qkv = attention.authors(block, x, tokens)
    assert qkv.attention.shape == (1, 17, 17) and qkv.attention.sum(-1).sub(1).abs().max() < 1e-4
    assert 0 < qkv.attention[0, 6, 5] < 1e-5 < qkv.attention[0, 4, 5]
