"""Level 4, computed: gathered columns and cut layers give the masked network's output; hooks mask gradients under torch.compile too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sparsity.vit import SparseViT
from sparsity.weights.gathered import GatheredLinear, gathered
from sparsity.weights.groups import Block
from sparsity.weights.magnitude import MagnitudeSettings
from sparsity.weights.projection import kept_groups, spread
from tests.sparsity.weights.test_groups import drawn
from tests.support.vits import images, tiny


@pytest.mark.parametrize(("shape", "size"), [((8, 12), (4, 6)), ((10, 13), (4, 6)), ((3, 5), (16, 64)), ((12, 8), (1, 4))])
@pytest.mark.parametrize("bias", [True, False])
def test_gathered_columns_are_the_masked_layer(shape, size, bias):
    site, weight, offset = Block("fc", *shape, size), drawn(*shape), drawn(shape[0], seed=1) if bias else None
    kept = kept_groups([site], {"fc.weight": weight}, 0.5, "block")
    masked = weight * spread([site], kept)["fc.weight"]
    layer = GatheredLinear(site, masked, kept["fc"], offset)
    x = drawn(2, 3, shape[1], seed=2)
    torch.testing.assert_close(layer(x), F.linear(x, masked, offset), rtol=1e-12, atol=1e-12)
    assert layer.weight.numel() <= site.grid[0] * site.grid[1] * layer.num, "only the kept groups are computed"


def test_a_network_in_block_form_is_the_masked_one_and_other_forms_are_refused():
    vit = tiny().eval()
    level = MagnitudeSettings(keep=0.5, block=(4, 6), prune=0.0).build(vit)
    level.begin_epoch(0, lambda: dict(vit.named_parameters()))
    with torch.no_grad():
        for name, mask in level.masks().items():
            vit.get_parameter(name).mul_(mask)
        torch.testing.assert_close(gathered(vit, level)(images(vit)), vit(images(vit)), rtol=0, atol=1e-5)
    vit = tiny()
    for settings, words in (
        ({"groups": "rows"}, "only columns of blocks that keep equal numbers"),
        ({"per": "layer"}, "set weights.groups=columns, weights.per=block"),
        ({"groups": "heads"}, "units and heads have no blocks"),
    ):
        other = MagnitudeSettings(keep=0.5, block=(4, 6), prune=0.0, **settings).build(vit)
        other.begin_epoch(0, lambda: dict(vit.named_parameters()))
        with pytest.raises(ValueError, match=words):
            gathered(vit, other)


@pytest.mark.slow
def test_gradients_are_masked_in_a_graph_that_was_compiled_before():
    """As a run does it: compiled at the start, hooks when the groups leave; the others' gradients are those of eager."""
    torch.compiler.reset()
    vit = tiny(depth=1).train()
    model, x = SparseViT(vit), images(vit)
    model.compile(backend="aot_eager")
    model(x).logits.sum().backward()
    level = MagnitudeSettings(keep=0.5, block=(4, 6), prune=0.0).build(vit)
    level.begin_epoch(0, lambda: dict(vit.named_parameters()))
    masks, parameters = level.masks(), dict(vit.named_parameters())
    for name, mask in masks.items():
        parameters[name].register_hook(partial(torch.mul, mask))
    torch.manual_seed(0)
    vit.zero_grad()
    model(x).logits.square().sum().backward()
    for name, mask in masks.items():
        assert parameters[name].grad[~mask].eq(0).all() and parameters[name].grad[mask].ne(0).any()
