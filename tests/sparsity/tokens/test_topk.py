"""Level 2 by score: what stays, in which order, ties, fusion, scores."""

import pytest
import torch

from sparsity.settings import Network
from sparsity.tokens import scores
from sparsity.tokens.topk import TopK, TopKSettings
from sparsity.types import DENSE, QKV, KeepAll, Plan, Tokens, VisibleKeys
from tests.support.vits import tiny

H, D_HEAD = 2, 4


def scene(batch=2, n=10, p=1, seed=0, **more) -> tuple[Tokens, QKV]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, p + n, 8, generator=g)
    q, k, v = (torch.randn(batch, H, p + n, D_HEAD, generator=g) for _ in range(3))
    return Tokens(x, torch.arange(n).expand(batch, -1), p, **more), QKV(q, k, v, D_HEAD**-0.5)


def given(values):
    """A score with given values."""
    return lambda tokens, qkv: torch.tensor(values)


def test_the_best_stay_in_their_order_with_the_prefix():
    tokens, qkv = scene(1, 5, p=2)
    after, carried = TopK(given([[0.1, 0.5, 0.3, 0.9, 0.2]]))(tokens, qkv, Plan(0.5))  # ceil(2.5)
    assert after.ids.tolist() == [[1, 2, 3]]
    where = [0, 1, 3, 4, 5]
    assert torch.equal(after.x, tokens.x[:, where])
    assert all(torch.equal(new, old[:, :, where]) for new, old in zip(carried[:3], qkv[:3], strict=True))


def test_ties_go_to_the_lower_id_also_after_a_selection():
    tokens, qkv = scene(1, 6)
    after, seen_after = TopK(given([[0.5, 0.5, 0.9, 0.5, 0.5, 0.5]]))(tokens, qkv, Plan(0.6))
    assert after.ids.tolist() == [[0, 1, 2, 3]]
    again, _ = TopK(given([[0.5] * 4]))(after, seen_after, Plan(0.5))
    assert again.ids.tolist() == [[0, 1]]
    authors, _ = TopK(given([[0.5, 0.5, 0.9, 0.5, 0.5, 0.5]]), authors=True)(tokens, qkv, Plan(0.6))
    assert authors.ids.tolist() == [[2, 0, 1, 3]]  # theirs: in the order of the scores


def test_sizes_follow_and_keys_are_cleared():
    tokens, qkv = scene(
        1, 4, size=torch.tensor([[1.0, 2, 3, 4, 5]]), keys=VisibleKeys(index=torch.zeros(1, 1, dtype=torch.long))
    )
    after, _ = TopK(given([[0.1, 0.4, 0.2, 0.3]]), fuse=True)(tokens, qkv, Plan(0.5))
    assert after.size.tolist() == [[1, 3, 5, 6]] and after.keys is None


def test_everything_stays_untouched_where_all_are_kept():
    tokens, qkv = scene()
    for reduce in (KeepAll(), TopK(scores.cls_row), TopK(scores.cls_row, fuse=True)):
        assert reduce(tokens, qkv, DENSE) == (tokens, qkv)
        assert reduce.count(10, DENSE) == 10


def test_a_softmax_so_sharp_that_all_dropped_weigh_nothing_fuses_to_nothing():
    """Level 3 ranks by the fused token's q and k: a NaN among them would have spoiled every row of its map."""
    tokens, qkv = scene(1, 5)
    after, carried = TopK(given([[0.6, 0.4, 0.0, 0.0, 0.0]]), fuse=True)(tokens, qkv, Plan(0.4))
    assert after.ids.tolist() == [[0, 1, -1]] and after.x[0, -1].eq(0).all()
    assert all(part[0, :, -1].eq(0).all() for part in carried[:3])


def test_the_fused_token_is_the_weighted_sum_and_its_gradient_reaches_the_scores():
    tokens, qkv = scene(2, 6)
    qkv.q.requires_grad_()
    tokens.x.requires_grad_()
    after, carried = TopK(scores.cls_row, fuse=True)(tokens, qkv, Plan(0.5))
    value = scores.cls_row(tokens, qkv)
    dropped = value.argsort(descending=True)[:, 3:]
    weights = value.gather(1, dropped)
    expected = torch.stack([sum(weights[b, j] * tokens.x[b, 1 + dropped[b, j]] for j in range(3)) for b in range(2)])
    assert torch.allclose(after.x[:, -1], expected, atol=1e-6)
    assert after.ids[:, -1].tolist() == [-1, -1] and after.ids.shape == (2, 4)
    share = (weights / weights.sum(1, keepdim=True))[:, None, :, None]
    index = (1 + dropped)[:, None, :, None].expand(-1, H, -1, D_HEAD)
    assert torch.allclose(carried.k[:, :, -1], (qkv.k.gather(2, index) * share).sum(2), atol=1e-6)
    after.x[:, -1].sum().backward()
    assert qkv.q.grad[:, :, 0].abs().sum() > 0 and qkv.q.grad[:, :, 1:].abs().sum() == 0


def test_the_choice_itself_carries_no_gradient():
    tokens, qkv = scene()
    qkv.q.requires_grad_()
    after, _ = TopK(scores.cls_row, carry_qkv=False)(tokens, qkv, Plan(0.5))
    assert not after.x.requires_grad


def test_cls_row_is_the_softmax_of_the_cls_query():
    tokens, qkv = scene(3, 7, p=2)
    attention = (qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale).softmax(-1)
    assert torch.allclose(scores.cls_row(tokens, qkv), attention[:, :, 0, 2:].mean(1))
    assert torch.allclose(scores.received(tokens, qkv), attention[:, :, :, 2:].mean((1, 2)))
    both = attention[:, :, :2, 2:].mean((1, 2))
    assert torch.allclose(scores.importance(tokens, qkv, "prefix"), both / both.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (Network(), {"default": "cls", "prefix": "cls", "cls": "cls", "received": "received", "value_norm": "value_norm"}),
        (Network(num_prefix=2, position="block"), {"default": "prefix", "prefix": "prefix", "cls": "cls"}),
        (Network(num_prefix=2), {"default": "cls", "prefix": "prefix"}),
        (Network(has_class_token=False, num_prefix=3, position="block"), {"default": "received"}),
        (Network(has_class_token=False, num_prefix=0), {"default": "received"}),
    ],
)
def test_default_names_one_score_and_equal_scores_have_one_name(network, named):
    assert {name: network.importance(name) for name in named} == named
    for name, score in named.items():
        assert TopKSettings(importance=name).build(network).score is scores.BY_NAME[score]


def test_scores_are_float32_under_autocast_and_count_merged_patches():
    tokens, qkv = scene(2, 5)
    low = QKV(*(t.bfloat16() for t in qkv[:3]), qkv.scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert scores.cls_row(tokens, low).dtype == torch.float32
    exact = scores.cls_row(tokens, QKV(*(t.float() for t in low[:3]), qkv.scale))
    assert torch.equal(scores.cls_row(tokens, low), exact)
    doubled = tokens.with_(size=torch.tensor([1.0, 2, 1, 1, 1, 1]).expand(2, -1))
    assert (scores.cls_row(doubled, qkv)[:, 0] > scores.cls_row(tokens, qkv)[:, 0]).all()


def test_random_keeps_every_patch_equally_often_and_nests():
    rng_keys = torch.arange(3000)
    tokens = Tokens(torch.zeros(3000, 11, 1), torch.arange(10).expand(3000, -1), 1, rng_keys=rng_keys)
    qkv = QKV(*[torch.zeros(3000, 1, 11, 1)] * 3, 1.0)
    after, _ = TopK(scores.random)(tokens, qkv, Plan(0.3))
    counts = after.ids.flatten().bincount(minlength=10)
    assert (counts - 900).abs().max() < 5 * (3000 * 0.3 * 0.7) ** 0.5
    fixed, _ = TopK(scores.random)(tokens.with_(rng_keys=None), qkv, Plan(0.3))
    assert (fixed.ids == fixed.ids[0]).all()  # without a key: one choice for every image


@pytest.mark.parametrize(
    ("n", "keep", "k"),
    [(196, 0.9, 177), (177, 0.9, 160), (160, 0.9, 144), (196, 0.7, 138), (97, 0.7, 68), (100, 0.55, 56), (3, 0.01, 1)],
)
def test_counts(n, keep, k):
    assert TopK(scores.cls_row).count(n, Plan(keep)) == k
    assert TopK(scores.cls_row, fuse=True).count(n, Plan(keep)) == k + 1


def test_a_family_without_cls_is_ranked_by_what_patches_receive():
    vit = tiny(class_token=False, global_pool="avg")
    assert TopKSettings().build(Network(has_class_token=vit.has_class_token)).score is scores.received


@pytest.mark.parametrize("n", [17, 196, 1024])
def test_ties_in_long_rows_go_by_position(n):
    """Up to 16 entries torch's plain sort is stable by accident; from 17 on it is not, on a CPU either. Half precision makes such ties."""
    values = torch.randint(0, 3, (4, n), generator=torch.Generator().manual_seed(n)).float() / 2
    by_position = [sorted(range(n), key=lambda i, row=row: (-row[i], i)) for row in values.tolist()]
    assert scores.ranked(values).tolist() == by_position
    tokens, qkv = scene(4, n)
    after, _ = TopK(given(values.tolist()))(tokens, qkv, Plan(0.45))
    assert after.ids.tolist() == [sorted(row[: after.ids.shape[1]]) for row in by_position]
    cut = after.ids.shape[1]
    assert any(row[by[cut - 1]] == row[by[cut]] for row, by in zip(values.tolist(), by_position, strict=True)), (
        "a tie at the cut"
    )
