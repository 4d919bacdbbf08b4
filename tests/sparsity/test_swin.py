"""Level 2 in a Swin stage (docs/methods.md, section Swin): timm bit for bit at keep 1, else what a full computation with hidden keys gives,
on exactly k tokens. The reference code's own form: tests/laws/test_golden.py."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import nn

from sparsity.build import build
from sparsity.dense import Dense
from sparsity.swin.network import SparseSwin
from sparsity.tokens.topk import RandomSettings, TopKSettings
from sparsity.types import DENSE, Plan
from tests.sparsity.test_cost import counted
from tests.support.networks import swin
from tests.support.vits import logits_and_grads

BLOCKS, LESS = (2, 3, 4), Plan(0.6)
KEPT = frozenset({"kept"})


def selecting(net: nn.Module, tokens="topk", position: str = "block", **levels) -> SparseSwin:
    model = build(net, tokens=tokens, blocks=BLOCKS, position=position, **levels)
    assert isinstance(model, SparseSwin)
    return model


def pixels(size: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "version"), [(64, 1), (40, 1), (40, 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_kept_is_timm_bit_for_bit(size, version, checkpointing):
    net = swin(size, version).train()
    net.set_grad_checkpointing(checkpointing)
    ours, x = selecting(net), pixels(size)
    outputs = frozenset({"kept", "cls_attention"})
    logits, grads = logits_and_grads(net, lambda: ours(x, DENSE, outputs).logits)
    theirs, timms_grads = logits_and_grads(net, lambda: net(x))
    other, _ = logits_and_grads(net, lambda: net(x), seed=8)
    assert torch.equal(logits, theirs) and not torch.equal(logits, other)
    assert all(torch.equal(a, b) for a, b in zip(grads, timms_grads, strict=True))
    assert torch.equal(ours.eval()(x).logits, net.eval()(x))


def attended(attention, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of queries and keys with position bias (B * windows, H, N, N), and values, of all tokens (B * windows, N, D)."""
    first = isinstance(attention, WindowAttention)
    bias = attention.qkv.bias if first else torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    qkv = F.linear(windows, attention.qkv.weight, bias)
    q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if first:
        return q @ k.transpose(-2, -1) * attention.scale + attention._get_rel_pos_bias(), v
    cosine = F.cosine_similarity(q[..., None, :], k[..., None, :, :], dim=-1)
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, 2)[attention.relative_position_index]
    return cosine * attention.logit_scale.exp().clamp(max=100) + 16 * table.sigmoid().movedim(2, 0), v


def masked(block, x: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block on x (B, H, W, D) that computes every token, with the keys of hidden ones off; and the attention that each token receives."""
    batch, height, width = x.shape[:3]
    (high, wide), attention = block.window_size, block.attn
    high_pad, wide_pad = -height % high, -width % wide

    def cut(grid: torch.Tensor, fill: float) -> torch.Tensor:
        rolled = torch.roll(grid, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
        return window_partition(F.pad(rolled, (0, 0, 0, wide_pad, 0, high_pad), value=fill), block.window_size).flatten(1, 2)

    def joined(windows: torch.Tensor) -> torch.Tensor:
        grid = window_reverse(
            windows.view(-1, high, wide, windows.shape[-1]), block.window_size, height + high_pad, width + wide_pad
        )
        return torch.roll(grid[:, :height, :width], block.shift_size, (1, 2))

    first = isinstance(attention, WindowAttention)
    products, v = attended(attention, cut(block.norm1(x) if first else x, 0.0))
    if block.attn_mask is not None:
        products = (products.unflatten(0, (batch, -1)) + block.attn_mask[None, :, None]).flatten(0, 1)
    shown = cut(visible.view(batch, height, width, 1).float(), 1.0)[:, None, None, :, 0] > 0
    weights = products.masked_fill(~(shown | torch.eye(high * wide, dtype=torch.bool)), float("-inf")).softmax(-1)
    queries = cut(visible.view(batch, height, width, 1).float(), 0.0)
    received = joined((weights.mean(1) * queries).sum(1)[..., None]).flatten(1)
    out = joined(attention.proj((weights @ v).transpose(1, 2).flatten(2)))
    x = x + (out if first else block.norm1(out))
    return x + (block.mlp(block.norm2(x)) if first else block.norm2(block.mlp(x))), received


def full(net, x: torch.Tensor, keep: float) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The whole network, every token computed, hidden ones with their old value; selection after the blocks."""
    number, kept, x = 0, {}, net.patch_embed(x)
    for stage in net.layers:
        x = stage.downsample(x)
        visible = torch.ones(len(x), x.shape[1] * x.shape[2], dtype=torch.bool)
        for block in stage.blocks:
            after, received = masked(block, x, visible)
            x = torch.where(visible.view(*x.shape[:3], 1), after, x)
            if number in BLOCKS:
                order = received.masked_fill(~visible, -1).sort(dim=1, descending=True, stable=True).indices
                ids = order[:, : math.ceil(int(visible[0].sum()) * keep)].sort(1).values
                visible, kept[number] = torch.zeros_like(visible).scatter(1, ids, True), ids
            number += 1
    return net.forward_head(net.norm(x)), kept


@pytest.mark.parametrize(("size", "version"), [(64, 1), (40, 1), (64, 2), (40, 2)])
def test_it_computes_what_hidden_keys_give(size, version):
    """Logits, gradients and kept tokens, with shifted windows and padding. A token that is left out keeps its value."""
    net, x = swin(size, version, drop_path_rate=0.0), pixels(size)
    ours = selecting(net)
    logits, grads = logits_and_grads(net, lambda: ours(x, LESS).logits)
    theirs, other_grads = logits_and_grads(net, lambda: full(net, x, LESS.keep_tokens)[0])
    assert torch.allclose(logits, theirs, atol=1e-4) and not torch.allclose(logits, net(x), atol=1e-2)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=2e-3) for a, b in zip(grads, other_grads, strict=True))
    kept, expected = ours(x, LESS, KEPT).kept, full(net, x, LESS.keep_tokens)[1]
    assert kept is not None and all(torch.equal(kept[block], expected[block]) for block in BLOCKS)


@pytest.mark.parametrize("tokens", ["topk", "random"])
@pytest.mark.parametrize("position", ["block", "attention"])
def test_exactly_k_stay_and_none_returns(tokens, position):
    ours = selecting(swin(64).eval(), tokens, position)
    for keep in (0.95, 0.6, 0.1):
        kept = ours(pixels(64), Plan(keep), KEPT, torch.arange(3)).kept
        left = 64
        for block in BLOCKS:
            left = math.ceil(left * keep)
            assert kept[block].shape == (3, left) and (kept[block].diff(dim=1) > 0).all()
        for before, after in pairwise(BLOCKS):
            assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(kept[after], kept[before], strict=True))


def test_ties_are_broken_by_place():
    net = swin(64).eval()
    for block in net.layers[2].blocks:
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias, block.attn.relative_position_bias_table):
            nn.init.zeros_(parameter)  # every token receives as much
    kept = selecting(net)(pixels(64), Plan(0.5), KEPT).kept
    assert torch.equal(kept[2], torch.arange(32).expand(3, -1))


@pytest.mark.parametrize("position", ["block", "attention"])
def test_norm_qkv_projection_and_mlp_run_on_the_kept_tokens_only(position):
    ours, found = selecting(swin(64).eval(), position=position), {}
    for at, block in enumerate(ours.network.layers[2].blocks):
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1"):
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, given, key=(2 + at, name): found.update({key: given[0].shape[-2]})
            )
    ours(pixels(64), Plan(0.5))
    for number in range(3, 8):
        in_attention = {3: 32, 4: 16}.get(number, 8)
        in_mlp = in_attention if position == "block" else {3: 16, 4: 8}.get(number, 8)
        assert [found[number, name] for name in ("norm1", "attn.qkv", "attn.proj")] == [in_attention] * 3
        assert [found[number, name] for name in ("norm2", "mlp.fc1")] == [in_mlp] * 2


@pytest.mark.parametrize(("size", "version"), [(64, 1), (40, 1), (40, 2)])
@pytest.mark.parametrize("tokens", ["topk", "random"])
@pytest.mark.parametrize("position", ["block", "attention"])
def test_torch_counts_the_same_multiply_adds(size, version, tokens, position):
    ours = selecting(swin(size, version), tokens, position)
    shared = sum(  # the position bias of V2, once for the whole batch: not of an image
        block.attn.relative_coords_table[..., 0].numel() * sum(part.weight.numel() for part in block.attn.cpb_mlp[::2])
        for stage in ours.network.layers for block in stage.blocks if version == 2
    )  # fmt: skip
    for plan in (DENSE, LESS, Plan(0.2)):
        cost = ours.cost(plan)
        assert counted(ours, plan, pixels(size, 1)) - shared == pytest.approx(cost.total, rel=2e-3)
        assert len(cost.tokens) == len(cost.per_block) == 9 and cost.left == cost.tokens[-1]
    assert ours.cost(LESS).tokens[2:8] == ((64, 39, 24, 15, 15, 15) if size == 64 else (25, 15, 9, 6, 6, 6))


@pytest.mark.parametrize(("tokens", "version"), [("topk", 1), ("random", 1), ("topk", 2)])
def test_an_image_does_not_depend_on_its_batch(tokens, version):
    ours, x, keys = selecting(swin(64, version, drop_path_rate=0.5).train(), tokens), pixels(64, 5), torch.arange(5) * 977
    state = torch.get_rng_state()
    whole = ours(x, LESS, rng_keys=keys).logits
    assert torch.equal(state, torch.get_rng_state())
    parts = torch.cat([ours(x[i], LESS, rng_keys=keys[i]).logits for i in (slice(3, 5), slice(0, 3))])
    assert torch.allclose(whole, torch.cat((parts[2:], parts[:2])), atol=1e-4)
    assert not torch.allclose(whole, ours(x, LESS, rng_keys=keys + 1).logits, atol=1e-2)


@pytest.mark.parametrize(("compat", "version"), [("none", 1), ("authors", 1), ("none", 2)])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(compat, version):
    net = swin(64, version).train()
    ours, x, keys = selecting(net, compat=compat), pixels(64, 6), torch.arange(6)
    logits, grads = logits_and_grads(net, lambda: ours(x, LESS, rng_keys=keys).logits)
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
    net.set_grad_checkpointing()
    again, grads_again = logits_and_grads(net, lambda: ours(x, LESS, rng_keys=keys).logits)
    assert torch.equal(logits, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16_autocast(version):
    net = swin(64, version).eval()
    ours, x = selecting(net), pixels(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x).logits, net(x))
        half = ours(x, LESS, frozenset({"kept", "cls_attention"}))
    exact = ours(x, LESS, frozenset({"kept", "cls_attention"}))
    assert half.logits.isfinite().all() and half.cls_attention.dtype == torch.float32
    assert half.cls_attention.shape == exact.cls_attention.shape == (3, 16)
    assert [ids.shape for ids in half.kept.values()] == [ids.shape for ids in exact.kept.values()]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_it_compiles_whole_with_the_gradients_of_eager(version):
    torch.compiler.reset()
    net = swin(40, version, depths=(1, 3), num_heads=(1, 2)).train()
    ours = build(net, tokens="topk", blocks=(1, 2), position="block")
    x, keys = pixels(40), torch.arange(3)
    logits, grads = logits_and_grads(net, lambda: ours(x, LESS, rng_keys=keys).logits)
    ours.compile(fullgraph=True, backend="aot_eager")
    found, our_grads = logits_and_grads(net, lambda: ours(x, LESS, rng_keys=keys).logits)
    assert torch.allclose(found, logits, atol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(our_grads, grads, strict=True))


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"tokens": "tome"}, r"tokens.method=tome with a SwinTransformer.*tokens.method=topk\|random"),
        ({"tokens": TopKSettings(fuse=True)}, "tokens.method=topk with a SwinTransformer.*tokens.fuse=false"),
        ({"tokens": TopKSettings(importance="cls")}, "tokens.method=topk with a SwinTransformer.*importance=received"),
        ({"tokens": RandomSettings(fuse=True)}, "tokens.method=random with a SwinTransformer"),
        ({"connections": "exact"}, "no level 3.*connections.method=all"),
        ({"tokens": "topk", "blocks": ()}, "tokens.blocks=.*name the blocks"),
        ({"tokens": "topk", "blocks": (3, 9)}, "has blocks 0 to 8"),
        ({"tokens": "topk", "blocks": (3, 6, 7)}, r"can select: 2 to 6 \(stage 3\); the authors select in \[3, 4, 5\]"),
        ({"tokens": "topk", "blocks": (0, 3)}, "all must be in one stage"),
        ({"tokens": "topk", "blocks": (0,)}, r"blocks of this network that can select: 2 to 6 \(stage 3\)"),
        ({"tokens": "topk", "blocks": (-1,)}, r"blocks=\[-1\]: this network has blocks 0 to 8"),
        ({"tokens": "topk", "position": "end"}, "position='end': unknown value; valid values: attention"),
        ({"tokens": "topk", "position": "attention", "compat": "authors"}, "tokens.position=block"),
        ({"tokens": "random", "position": "block", "compat": "authors"}, "by received attention"),
    ],
)
def test_what_windows_do_not_have_is_refused_by_key(levels, expected):
    with pytest.raises(ValueError, match=expected):
        build(swin(64), **({"blocks": BLOCKS} | levels))


def test_a_network_without_third_stage_names_what_can_select():
    two = swin(64, depths=(2, 3), num_heads=(1, 2))
    with pytest.raises(ValueError, match=r"can select: 0 to 0 \(stage 1\), 2 to 3 \(stage 2\)$"):
        build(two, tokens="topk", blocks=(1,))
    kept = build(two.eval(), tokens="topk", blocks=(2, 3))(pixels(64), Plan(0.01), KEPT).kept
    assert kept is not None and [ids.shape[1] for ids in kept.values()] == [math.ceil(0.01 * 256), 1]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_batch_size_stays_open_in_an_exported_graph(share):
    """What ONNX files are made of: `len` of a tensor would fix it."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(swin(40, depths=(1, 1, 3), num_heads=(1, 2, 3)).eval(), tokens="topk", blocks=(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, Plan(share)).logits

    graph = torch.export.export(Logits(), (pixels(40, 2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert torch.allclose(graph.module()(pixels(40, 5)), Logits()(pixels(40, 5)), atol=1e-5)


def test_other_networks_of_the_kind_are_computed_whole():
    assert type(build(swin(64))) is type(build(swin(64, version=2))) is SparseSwin
    with pytest.raises(ValueError, match=r"compat=authors: the reference code has no SwinTransformerV2; choose .*swin_\*"):
        build(swin(64, version=2), tokens="topk", blocks=BLOCKS, position="block", compat="authors")
    assert type(build(swin(64, dynamic_img_size=True), image_size=64)) is Dense
    with pytest.raises(ValueError, match="dynamic_img_size changes the windows"):
        build(swin(64, dynamic_img_size=True), tokens="topk", blocks=BLOCKS)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("part", "expected"),
    [("", "block 3 has a Other"), ("attn", "block 3 has a Other"), ("drop_path1", "drop path of block 3 is a Other")],
)
def test_blocks_of_another_kind_are_refused_by_their_number(version, part, expected):
    net = swin(64, version)
    block = net.layers[2].blocks[1]
    changed = block.get_submodule(part)
    changed.__class__ = type("Other", (type(changed),), {})
    with pytest.raises(ValueError, match=f"{expected}.*; only timm's"):
        build(net, tokens="topk", blocks=BLOCKS)


def test_authors_baseline_is_timms_form():
    ours = selecting(swin(64).eval(), compat="authors")
    dense, x = ours.dense(), pixels(64)
    assert isinstance(dense, SparseSwin) and not dense.authors and torch.equal(dense(x).logits, ours.network(x))
    assert ours.cost(LESS) == ours.cost() and selecting(swin(64)).dense().blocks
