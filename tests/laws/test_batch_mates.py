"""An image's logits depend on no other image of its batch, however many tokens each keeps. Law 18 of docs/laws.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsity.adaptive import EXECUTIONS, AdaptiveViT
from sparsity.build import build
from sparsity.tokens.tome import MergeSettings
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from tests.support.vits import FAMILIES, images

MANY, BLOCK = 14, 1
FORMS = ("dense", "topk", "fused", "random", "tome", "connections", *EXECUTIONS)


def network(form: str, family: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, their keys) -> logits."""
    torch.manual_seed(0)
    vit = FAMILIES[family]().double().eval()
    vit.blocks[BLOCK].attn.scale *= 10.0  # else importance is flat, and every image keeps as many
    if form in EXECUTIONS:
        adaptive = AdaptiveViT(build(vit, tokens="topk", blocks=(BLOCK,), position="block"), form, least=2)
        return lambda x, keys: adaptive(x, 0.6).logits
    tokens = {"fused": TopKSettings(fuse=True), "random": "random", "tome": MergeSettings(keep=0.6), "topk": "topk"}
    connections = "shared_keys" if form == "connections" else "all"
    model = build(vit, tokens=tokens.get(form, "all"), connections=connections, blocks=(BLOCK,))
    plan = DENSE if form == "dense" else Plan(0.6, 0.4)
    return lambda x, keys: model(x, plan, rng_keys=keys).logits


@pytest.mark.parametrize("family", ["deit", "registers"])
@pytest.mark.parametrize("form", FORMS)
def test_batch_mates_have_no_influence(form: str, family: str) -> None:
    """Twelve drawn batches of 1 to 14 images, in drawn orders, against each image alone."""
    forward = network(form, family)
    x, keys = images(FAMILIES[family](), MANY).double(), torch.arange(MANY) * 7919
    with torch.no_grad():
        alone = torch.cat([forward(x[row : row + 1], keys[row : row + 1]) for row in range(MANY)])
        g = torch.Generator().manual_seed(1)
        for _ in range(12):
            rows = torch.randperm(MANY, generator=g)[: int(torch.randint(1, MANY + 1, (), generator=g))]
            assert torch.allclose(forward(x[rows], keys[rows]), alone[rows], rtol=0, atol=1e-12)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
