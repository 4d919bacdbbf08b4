"""Another number of tokens for each image: three executions with equal results, and no influence of batch mates."""

import pytest
import torch

from sparsity.adaptive import EXECUTIONS, AdaptiveViT
from sparsity.build import build
from sparsity.tokens import scores
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from tests.support.vits import FAMILIES, images, tiny

BLOCK = 1


def network(family: str = "deit"):
    torch.manual_seed(0)
    vit = FAMILIES[family]().double().eval()
    vit.blocks[
        BLOCK
    ].attn.scale *= 10.0  # of the scores: importance of a new network is flat, and every image would keep as many
    return build(vit, tokens="topk", blocks=(BLOCK,), position="block")


def logits(model, pixels, mass, execution, least=2):
    return AdaptiveViT(model, execution=execution, least=least)(pixels, mass)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_executions_agree(family):
    model = network(family)
    pixels = images(model.vit, 9).double()
    tokens, ranked = AdaptiveViT(model).ranked(pixels)
    num = ranked.order.shape[1]
    counts = torch.tensor([1, num, 2, num // 2, num // 2, 1, num - 1, 2, num // 2]).clamp(min=1)
    found = {
        execution: AdaptiveViT(model, execution=execution).finish(tokens, ranked.order, counts) for execution in EXECUTIONS
    }
    for execution in ("packed", "padded"):
        assert torch.allclose(found[execution].logits, found["per_image"].logits, rtol=0, atol=1e-12)
    kept_less = (found["packed"].logits - model(pixels, DENSE).logits).abs().amax(dim=1)
    assert (kept_less[counts < num] > 1e-6).all() and (kept_less[counts == num] < 1e-12).all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_batch_mates_have_no_influence(execution):
    model = network()
    pixels = images(model.vit, 12).double()
    together = logits(model, pixels, 0.6, execution)
    for rows in ([3], [0, 3, 7], [11, 3, 2, 5, 8]):
        some = logits(model, pixels[rows], 0.6, execution)
        assert torch.equal(some.counts, together.counts[rows])
        assert torch.allclose(some.logits, together.logits[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_mass_of_one_is_the_dense_network(execution):
    model = network()
    pixels = images(model.vit, 4).double()
    found = logits(model, pixels, 1.0, execution)
    assert found.counts.tolist() == [16] * 4
    assert torch.allclose(found.logits, model(pixels, DENSE).logits, rtol=0, atol=1e-12)


SEVERAL = ("deit_distilled", "registers", "registers_without_cls")  # prefix tokens: there "default" had two meanings


@pytest.mark.parametrize(
    ("execution", "family"), [*((one, "deit") for one in EXECUTIONS), *(("packed", one) for one in SEVERAL)]
)
def test_equal_counts_are_the_value_based_selection(execution, family):
    model = network(family)
    pixels = images(model.vit, 5).double()
    adaptive = AdaptiveViT(model, execution=execution)
    tokens, ranked = adaptive.ranked(pixels)
    found = adaptive.finish(tokens, ranked.order, torch.full((5,), 8))
    assert torch.allclose(found.logits, model(pixels, Plan(0.5)).logits, rtol=0, atol=1e-12)


def test_bf16_stays_near():
    """The same tokens (selected in float32 of bf16 inputs), products rounded to 8 bits: a relative error of some 2^-8 per block. The
    tolerance is stated in docs/methods.md, section SaiT."""
    model = network().float()
    pixels = images(model.vit, 8)
    with torch.autocast("cpu", torch.bfloat16):
        alone, *others = (logits(model, pixels, 0.6, execution) for execution in ("per_image", "packed", "padded"))
    for other in others:
        assert torch.equal(alone.counts, other.counts)
        assert torch.allclose(alone.logits.float(), other.logits.float(), atol=2e-2 * float(alone.logits.abs().max()))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_tokens_between_blocks_have_the_type_of_training(execution):
    """engine.residual=bf16, and LayerScale in float32, which would widen them again: in every block, before and after the selection."""
    model = network("deit3_layer_scale").float()
    model.residual, kinds = torch.bfloat16, []
    for block in model.vit.blocks:
        block.norm1.register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, images(model.vit, 3), 0.6, execution)
    assert set(kinds) == {torch.bfloat16}
    plain = network("deit3_layer_scale").float()
    assert torch.equal(  # bf16 between blocks is a setting of autocast: without it, tokens are as wide as the products
        logits(model, images(model.vit, 3), 0.6, execution).logits, logits(plain, images(plain.vit, 3), 0.6, execution).logits
    )


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_image_gives_no_logits(execution):
    found = logits(network(), torch.zeros(0, 3, 16, 16, dtype=torch.float64), 0.6, execution)
    assert found.logits.shape == (0, 5) and found.counts.shape == (0,)


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_mass_and_distillation_rank_by_one_score(family):
    model = network(family)
    pixels = images(model.vit, 3).double()
    wanted = frozenset({f"importance:{BLOCK}", "kept"})
    found = model(pixels, Plan(0.4), wanted)
    order = AdaptiveViT(model).ranked(pixels)[1].order
    kept = found.kept[BLOCK]
    assert torch.equal(order[:, : kept.shape[1]].sort(dim=1).values, kept)
    assert torch.equal(scores.ranked(found.importance), order)


def test_the_score_is_a_choice():
    model = network()
    norms = build(model.vit, tokens=TopKSettings(importance="value_norm"), blocks=(BLOCK,), position="block")
    pixels = images(model.vit, 4).double()
    default, other = AdaptiveViT(model).ranked(pixels)[1], AdaptiveViT(norms).ranked(pixels)[1]
    assert not torch.equal(default.order, other.order)
    assert torch.allclose(other.mass[:, -1], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (0, 1)}, r"tokens.blocks=\[0, 1\]: mass-based selection needs exactly one pruning block"),
        ({"position": "attention"}, "set tokens.position=block"),
        ({"connections": "exact"}, "set connections.method=all"),
        ({"compat": "authors"}, "set compat=none"),
    ],
)
def test_other_mechanisms_are_refused(settings, message):
    model = build(tiny(), **({"tokens": TopKSettings(), "blocks": (1,), "position": "block"} | settings))
    with pytest.raises(ValueError, match=message):
        AdaptiveViT(model)


def test_an_unknown_execution_is_refused():
    with pytest.raises(ValueError, match="execution='sorted': unknown value; valid values: packed, padded, per_image"):
        AdaptiveViT(network(), execution="sorted")
