"""Law 1 of docs/laws.md: with everything kept, timm bit for bit. And what may change when not everything is kept, and what is refused."""

import math

import pytest
import torch
from timm.layers import DiffAttention, DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from sparsity.build import build
from sparsity.drop_path import of_branch
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from sparsity.vit import SparseViT
from tests.support.vits import FAMILIES, images, logits_and_grads, tiny

SPARSE = Plan(0.6, 0.4)


def levels(vit: VisionTransformer) -> SparseViT:
    return build(vit, tokens="topk", connections="exact", blocks=(0, 1))


@pytest.fixture(params=FAMILIES)
def vit(request) -> VisionTransformer:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def test_all_kept_is_timm_bitwise_in_evaluation(vit):
    ours, x = levels(vit.eval()), images(vit)
    assert torch.equal(ours(x).logits, vit(x))
    assert torch.equal(ours(x, DENSE, frozenset({"cls_attention", "importance:1", "kept", "keys"})).logits, vit(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_kept_is_timm_bitwise_in_training(vit, checkpointing):
    ours, x = levels(vit.train()), images(vit)
    vit.set_grad_checkpointing(checkpointing)
    our_logits, our_grads = logits_and_grads(vit, lambda: ours(x).logits)
    logits, grads = logits_and_grads(vit, lambda: vit(x))
    other, _ = logits_and_grads(vit, lambda: vit(x), seed=8)
    assert torch.equal(our_logits, logits) and not torch.equal(logits, other)  # and chance has its part in it
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(our_grads, grads, strict=True))


def test_every_block_is_checkpointed_where_that_is_enabled_only(monkeypatch):
    """Results are the same; only memory and time are not."""
    calls = []
    monkeypatch.setattr("sparsity.vit.checkpoint", lambda block, *given, **_: calls.append(1) or block(*given))
    vit = tiny()
    ours = levels(vit.train())
    for enabled in (False, True):
        calls.clear()
        vit.set_grad_checkpointing(enabled)
        ours(images(vit), SPARSE, rng_keys=torch.arange(4))
        assert len(calls) == (len(vit.blocks) if enabled else 0)


def test_every_family_trains_with_less(vit):
    """Token counts as planned, checkpointing changes nothing, and importance, [CLS] attention, keys have their shapes."""
    ours, x, rng_keys = levels(vit.train()), images(vit), torch.arange(4)
    outputs = frozenset({"kept", "keys", "cls_attention", "importance:0"})
    logits, grads = logits_and_grads(vit, lambda: ours(x, SPARSE, rng_keys=rng_keys).logits)
    vit.set_grad_checkpointing()
    again, grads_again = logits_and_grads(vit, lambda: ours(x, SPARSE, rng_keys=rng_keys).logits)
    assert torch.equal(logits, again)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    record = ours(x, SPARSE, outputs, rng_keys)
    n = record.importance.shape[1]
    first = math.ceil(n * 0.6)
    second = math.ceil(first * 0.6)
    assert [ids.shape for ids in record.kept.values()] == [(4, first), (4, second)]
    assert record.cls_attention.shape == (4, second)
    assert record.importance.sum(1).sub(1).abs().max() < 1e-5 or vit.num_prefix_tokens == 0
    p = vit.num_prefix_tokens
    assert record.keys[0].mask.shape == (4, 1, p + first, p + first)
    assert all(
        len(set(row)) == second and set(row) <= set(range(vit.patch_embed.num_patches)) for row in record.kept[1].tolist()
    )


def test_distilled_training_returns_both_heads():
    vit = tiny(VisionTransformerDistilled).train()
    vit.set_distilled_training()
    ours, x = levels(vit), images(vit)
    torch.manual_seed(1)
    both = ours(x).logits
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(both, vit(x), strict=True)) and len(both) == 2


def test_any_image_size_is_resampled_as_timm_does():
    vit = tiny(dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 24, 20)
    assert torch.equal(levels(vit)(x).logits, vit(x))


def test_weights_keep_timms_names():
    vit = tiny()
    assert {"network." + name for name in vit.state_dict()} == set(levels(vit).state_dict())


def test_ids_survive_patch_drop():
    """timm's patch drop shuffles the patches; an id still names the patch: it finds back its position embedding."""
    vit = tiny(patch_drop_rate=0.5, depth=1, drop_path_rate=0.0).train()
    nn.init.zeros_(vit.patch_embed.proj.weight), nn.init.zeros_(vit.patch_embed.proj.bias)
    for rng_keys in (None, torch.arange(4)):
        torch.manual_seed(3)
        tokens = build(vit)._embedded(images(vit), rng_keys)
        assert tokens.x.shape[1] == 9
        assert torch.equal(tokens.x[:, 1:], vit.pos_embed[0, 1:][tokens.ids])


@pytest.mark.parametrize("tokens", ["topk", "random", "tome"])
def test_a_draw_makes_an_image_independent_of_its_batch(tokens):
    """Law 3 of docs/laws.md, with drop path and patch drop: masks follow the image's key, not its place, and no generator is touched."""
    vit = tiny(drop_path_rate=0.5, patch_drop_rate=0.3).train()
    ours, x, rng_keys = build(vit, tokens=tokens, connections="shared_keys", blocks=(1,)), images(vit, 6), torch.arange(6) * 977
    state = torch.get_rng_state()
    whole = ours(x, SPARSE, rng_keys=rng_keys).logits
    assert torch.equal(state, torch.get_rng_state())
    parts = torch.cat([ours(x[i], SPARSE, rng_keys=rng_keys[i]).logits for i in (slice(4, 6), slice(0, 4))])
    assert torch.allclose(whole, torch.cat((parts[2:], parts[:2])), atol=1e-5)
    assert not torch.allclose(whole, ours(x, SPARSE, rng_keys=rng_keys + 1).logits, atol=1e-2)


def test_a_key_changes_nothing_in_evaluation():
    vit = tiny(drop_path_rate=0.5, patch_drop_rate=0.3).eval()
    ours, x = build(vit), images(vit)
    assert torch.equal(ours(x, rng_keys=torch.arange(4)).logits, ours(x).logits)


def test_a_random_choice_is_another_for_every_key():
    """Images that are equal to the bit keep other patches: the key reaches the blocks."""
    vit = tiny(drop_path_rate=0.0).eval()
    ours, x = build(vit, tokens="random", blocks=(1,)), images(vit, 1).expand(6, -1, -1, -1)
    kept = ours(x, Plan(0.5, 1.0), frozenset({"kept"}), torch.arange(6) * 977).kept
    assert kept is not None and len({tuple(row.tolist()) for row in kept[1]}) == 6


def test_ordered_patch_drop_keeps_patches_in_their_order():
    vit = tiny(patch_drop_rate=0.5).train()
    vit.patch_drop.ordered = True
    for rng_keys in (None, torch.arange(4)):
        ids = build(vit)._embedded(images(vit), rng_keys).ids
        assert (ids.diff(dim=1) > 0).all()


def test_keyed_drop_path_drops_the_share_it_should():
    vit = tiny(drop_path_rate=0.5, depth=2).train()  # rates 0 and .5
    ours, x, rng_keys = build(vit), images(vit, 1).expand(400, -1, -1, -1), torch.arange(400)
    with torch.no_grad():
        found = ours(x, rng_keys=rng_keys).logits
    kinds, counts = found.mul(1e3).round().unique(dim=0, return_counts=True)
    assert len(kinds) == 4 and counts.min() > 70 and counts.max() < 130  # two branches, each there or not


def test_keyed_drop_path_scales_as_timms_does():
    path, x, drawn = (
        DropPath(0.2).train(),
        torch.ones(3, 2, 2),
        torch.tensor([[0.1, 0.79, 0.81], [0.9, 0.1, 0.1]])[..., None, None],
    )
    assert of_branch(path, x, drawn, 0)[:, 0, 0].tolist() == pytest.approx([1.25, 1.25, 0.0])
    assert of_branch(path, x, drawn, 1)[:, 0, 0].tolist() == pytest.approx([0.0, 1.25, 1.25])
    torch.manual_seed(0)
    assert set(path(x.repeat(9, 1, 1)).unique().tolist()) == {0.0, 1.25}


def test_position_block_leaves_the_mlp_whole():
    vit = tiny(depth=2, drop_path_rate=0.0).eval()
    early, late = (build(vit, tokens="topk", blocks=(0,), position=position) for position in ("attention", "block"))
    x, block, wanted = images(vit), vit.blocks[0], []
    block.mlp.register_forward_pre_hook(lambda _, given: wanted.append(given[0].shape[1]))
    outputs = [model(x, Plan(0.5)).logits for model in (early, late)]
    assert wanted == [9, 17] and not torch.allclose(outputs[1], vit(x), atol=1e-3)


def test_no_token_leaves_after_the_last_block():
    vit = tiny(depth=2)
    with pytest.raises(
        ValueError, match=r"tokens.blocks=\[0, 1\] with tokens.position=block: tokens would leave after the last block"
    ):
        build(vit, tokens="topk", blocks=(0, 1), position="block")
    assert build(vit, tokens="topk", blocks=(0, 1)).blocks == {0, 1}, "before its MLP they may"
    assert build(vit, blocks=(0, 1), position="block").blocks == frozenset(), "nothing selects"


def test_the_gather_is_skipped_where_all_stay():
    vit = tiny().eval()
    record = build(vit, tokens="topk", blocks=(0,))(images(vit), Plan(0.99), frozenset({"kept"}))
    assert torch.equal(record.logits, vit(images(vit))) and torch.equal(record.kept[0][0], torch.arange(16))


class Renamed(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x)


REFUSED = {
    "Eva": lambda: Eva(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3),
    "Linear": lambda: nn.Linear(2, 2),
    "Renamed has a forward_features": lambda: tiny(Renamed),
    "ParallelScalingBlock": lambda: tiny(block_fn=ParallelScalingBlock),
    "ParallelThingsBlock": lambda: tiny(block_fn=ParallelThingsBlock),
    "DiffAttention": lambda: tiny(attn_layer=DiffAttention, num_heads=2),
    "distillation token": lambda: tiny(VisionTransformerDistilled, patch_drop_rate=0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reproduced_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        build(REFUSED[name](), tokens="topk", blocks=(1,))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokens": "topp"}, "tokens.method='topp': unknown value; valid values: all, topk"),
        ({"connections": "none"}, "connections.method='none': unknown value"),
        ({"tokens": "topk", "blocks": ()}, "name the blocks"),
        ({"tokens": "topk", "blocks": (1, 3)}, "has blocks 0 to 2"),
        ({"tokens": "topk", "position": "mlp"}, "position='mlp'"),
        ({"compat": "paper"}, "compat='paper'"),
        ({"tokens": "random", "compat": "authors"}, "compat=authors with tokens.method=random"),
        ({"tokens": TopKSettings(fuse=True), "compat": "authors"}, "compat=authors with tokens.method=topk"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_key(settings, expected):
    with pytest.raises(ValueError, match=expected):
        build(tiny(), **({"blocks": (0, 1)} | settings))


def test_networks_without_cls_refuse_what_needs_it():
    vit = FAMILIES["average_pooling"]()
    for settings, expected in (
        ({"connections": "shared_keys"}, "no .CLS. token"),
        ({"tokens": "tome"}, "global_pool='avg'"),
        ({"tokens": "topk", "compat": "authors"}, "no prefix token but"),
    ):
        with pytest.raises(ValueError, match=expected):
            build(vit, blocks=(1,), **settings)


@pytest.mark.parametrize("outputs", ["attention", "importance:3", "importance:x"])
def test_an_unknown_wish_is_refused(outputs):
    vit = tiny()
    with pytest.raises(ValueError, match="outputs="):
        build(vit)(images(vit), outputs=frozenset({outputs}))
