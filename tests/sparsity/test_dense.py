"""Networks without levels 2 to 4 (docs/networks.md): timm bit for bit, drop path keyed by image, multiply-adds from the graph, and what
is refused by name."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from sparsity.build import build
from sparsity.dense import Dense
from sparsity.graph_cost import traced
from sparsity.types import Plan
from sparsity.vit import SparseViT
from tests.support.networks import KINDS, SIZE, network, pixels, swin
from tests.support.vits import FAMILIES, images, logits_and_grads, tiny

LARGE = ("efficientnet", "maxvit", "swin_v2_cr")  # seconds each


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow) if kind in LARGE else kind for kind in KINDS])
def kind(request) -> str:
    return request.param


def test_it_is_timm_bit_for_bit_in_evaluation_and_training(kind):
    """Logits, gradients and running statistics, with drop path from the global generator."""
    theirs, x = network(kind, drop_path=0.5).train(), pixels()
    ours = build(network(kind, drop_path=0.5).train(), image_size=SIZE)
    assert type(ours) is Dense
    logits, grads = logits_and_grads(theirs, lambda: theirs(x))
    found, our_grads = logits_and_grads(ours.network, lambda: ours(x).logits)
    assert torch.equal(found, logits)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(our_grads, grads, strict=True))
    state, our_state = theirs.state_dict(), ours.network.state_dict()
    assert list(state) == list(our_state) and all(torch.equal(state[name], our_state[name]) for name in state)
    assert torch.equal(ours.eval()(x).logits, theirs.eval()(x))


def test_drop_path_follows_the_image(kind):
    """The same masks alone, among others and in another order; other keys, other masks; the global generator is not touched. In evaluation
    mode are batch norms, which mix the images of a batch, and dropout: SwinV2-CR has it in its position bias, one mask for all images."""
    ours = build(network(kind, drop_path=0.5).train(), image_size=SIZE)
    for module in ours.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    x, keys, state = pixels(6), torch.arange(6) * 977, torch.get_rng_state()
    whole = ours(x, rng_keys=keys).logits
    assert torch.equal(state, torch.get_rng_state())
    parts = torch.cat([ours(x[i], rng_keys=keys[i]).logits for i in (slice(4, 6), slice(0, 4))])
    assert torch.allclose(whole, torch.cat((parts[2:], parts[:2])), atol=1e-4)
    assert not torch.allclose(whole, ours(x, rng_keys=keys + 1).logits, atol=1e-3)
    assert torch.equal(ours.eval()(x, rng_keys=keys).logits, ours(x).logits)


@pytest.mark.parametrize("checkpointed", ["convnext", "resnet", "eva", "mixer"])
def test_gradient_checkpointing_draws_the_same_drop_path_again(checkpointed):
    """The mixer calls each drop path twice in a block; its second pass must not go on with the numbers of the next call."""
    found = []
    for checkpointing in (False, True):
        ours = build(network(checkpointed, drop_path=0.5).train(), image_size=SIZE)
        ours.network.set_grad_checkpointing(checkpointing)
        found.append(logits_and_grads(ours.network, lambda ours=ours: ours(pixels(), rng_keys=torch.arange(4)).logits))
    (logits, grads), (again, grads_again) = found
    assert torch.equal(logits, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_two_calls_of_one_drop_path_draw_independently():
    ours = build(network("mixer", drop_path=0.5).train(), image_size=SIZE)
    ours(pixels(400), rng_keys=torch.arange(400))
    (path, other) = ours._paths
    first, second = (drawn < 1 - path.drop_prob for drawn in path.drawn)
    assert path.calls == other.calls == 2 and path.turn == 0
    assert 0.35 < (first == second).float().mean() < 0.65 or path.drop_prob == 0


@pytest.mark.slow
def test_it_compiles_whole_with_keyed_drop_path():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    ours = build(network("mixer", drop_path=0.5).train(), image_size=SIZE)
    x, keys = pixels(), torch.arange(4)
    logits, grads = logits_and_grads(ours.network, lambda: ours(x, rng_keys=keys).logits)
    ours.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, our_grads = logits_and_grads(ours.network, lambda: ours(x, rng_keys=keys).logits)
        assert torch.allclose(found, logits, atol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(our_grads, grads, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # other numbers are no other graph


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"patch_drop"}))
def test_the_graph_has_the_multiply_adds_that_we_count_for_vits(family):
    vit = FAMILIES[family]().eval()
    counted, output = traced(vit, *images(vit, 1).shape[2:])
    assert counted == pytest.approx(build(vit).cost().total, rel=1e-3) and output.shape == (1, 5)


@pytest.mark.parametrize(("name", "published"), [("resnet50", 4.09), ("convnext_tiny", 4.46)])
def test_multiply_adds_are_the_published_ones(name, published):
    """GMACs at 224 pixels: timm's results tables (rounded), torchvision for ResNet-50."""
    with torch.device("meta"):
        made = timm.create_model(name)
    assert traced(made.eval(), 224, 224)[0] / 1e9 == pytest.approx(published, rel=0.01)


def test_counting_leaves_no_trace():
    theirs = network("resnet").train()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = build(theirs, image_size=SIZE)
    assert theirs.training and not theirs._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    cost = ours.cost(Plan(0.5))
    assert cost == ours.cost() and cost.tokens == () and cost.per_block == (cost.total,)


def test_counting_leaves_no_trace_where_blocks_share_a_module(capfd):
    """CoaT shares position encodings among its blocks: torch's functional_call put tensors without values back into them."""
    settings = {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "num_heads": 8, "mlp_ratios": (1,) * 4}
    theirs = timm.create_model("coat_tiny", num_classes=5, img_size=SIZE, **settings, parallel_depth=1).eval()
    expected = theirs(pixels())
    ours = build(theirs, image_size=SIZE)
    assert all(type(value.data) is torch.Tensor for value in theirs.state_dict().values())
    assert torch.equal(ours(pixels()).logits, expected)
    with pytest.raises(
        ValueError, match=r"ResNet with these arguments does not take images of 32 x 32 pixels: .*choose another size"
    ):
        build(timm.create_model("resnet18", num_classes=5, global_pool="", layers=(1, 1, 1, 1)), image_size=SIZE)
    assert capfd.readouterr().err == ""  # torch logs 40 lines for an operation that fails on tensors without values


@pytest.mark.parametrize("made", [lambda: tiny(global_pool="", class_token=False), lambda: swin(SIZE, global_pool="")])
def test_networks_that_return_tokens_are_no_classifiers(made):
    with pytest.raises(ValueError, match="is not a classifier"):
        build(made())
    with pytest.raises(ValueError, match="global_pool='' returns tokens, not logits"):
        build(made(), tokens="random", blocks=(0,), image_size=SIZE)


def test_what_needs_tokens_is_refused_with_what_can():
    for levels, named in (({"tokens": "topk"}, "tokens.method=topk"), ({"connections": "exact"}, "connections.method=exact")):
        with pytest.raises(
            ValueError,
            match=rf"{named}: a ResNet .*\(ResNet is not a timm VisionTransformer; ResNet is not .*\); choose .*vit_\*",
        ):
            build(network("resnet"), **levels)
    with pytest.raises(ValueError, match=r"compat=authors: a ResNet keeps all tokens"):
        build(network("resnet"), compat="authors")
    ours = build(network("resnet"), image_size=SIZE)
    with pytest.raises(ValueError, match=r"outputs=cls_attention: ResNet gives logits only"):
        ours(pixels(), outputs=frozenset({"cls_attention"}))
    with pytest.raises(ValueError, match="ResNet has no tokens"):
        _ = ours.grid


def test_networks_that_are_no_classifiers_or_cannot_be_keyed_are_refused_by_name():
    with pytest.raises(ValueError, match="FeatureListNet is not a classifier"):
        build(timm.create_model("resnet18", features_only=True), image_size=SIZE)
    with pytest.raises(ValueError, match="Eva with these arguments does not take images of 24 x 24 pixels"):
        build(network("eva"), image_size=24)
    with pytest.raises(ValueError, match=r"drop path of a TNT acts on parts of images.*model.drop_path=0"):
        build(timm.create_model("tnt_s_legacy_patch16_224", drop_path_rate=0.1, depth=2, img_size=SIZE), image_size=SIZE)


class Median(torch.nn.Module):
    def forward(self, tokens):
        return tokens.median(1).values


def test_a_vit_of_unknown_cost_is_computed_whole():
    vit: Any = tiny(global_pool="map")
    vit.attn_pool = Median()
    assert type(build(vit)) is Dense and type(build(tiny())) is SparseViT
