"""Every family of networks with every method of levels 2 and 3 (docs/networks.md): it works as counted, or is refused by its key. A new
family joins by its row in FAMILIES, and the table of what it supports."""

from itertools import product

import pytest
import torch

from sparsity.build import FAMILIES, build
from sparsity.connections import CONNECTIONS
from sparsity.tokens import TOKENS
from sparsity.types import DENSE, Plan
from tests.support.networks import SIZE, network, swin
from tests.support.vits import logits_and_grads, tiny

LESS = Plan(0.6, 0.4)
NETWORKS = {  # a network of each family, side of its images, blocks that may select
    "vit": (tiny, 16, (0, 1)),
    "swin": (lambda: swin(SIZE, depths=(1, 1, 3, 1)), SIZE, (2, 3)),
    "dense": (lambda: network("convnext"), SIZE, (0, 1)),
}
SUPPORTED = {
    "vit": set(product(TOKENS, CONNECTIONS)),
    "swin": {("all", "all"), ("topk", "all"), ("random", "all")},
    "dense": {("all", "all")},
}
EACH = [(family, *levels) for family in FAMILIES for levels in product(TOKENS, CONNECTIONS)]


def test_every_family_has_its_row():
    assert set(NETWORKS) == set(SUPPORTED) == set(FAMILIES)


@pytest.mark.parametrize(("family", "tokens", "connections"), EACH)
def test_it_works_as_counted_or_is_refused_by_its_key(family, tokens, connections):
    make, size, blocks = NETWORKS[family]
    torch.manual_seed(0)
    net = make().train()
    levels = {"tokens": tokens, "connections": connections, "blocks": blocks, "image_size": size}
    if (tokens, connections) not in SUPPORTED[family]:
        with pytest.raises(ValueError, match=r"(tokens|connections)(\.method)?[=:].*(choose|set) "):
            build(net, **levels)
        return
    ours = build(net, **levels)
    assert type(ours) is FAMILIES[family]
    x, keys = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    logits, grads = logits_and_grads(net, lambda: ours(x, DENSE).logits)
    timms, timms_grads = logits_and_grads(net, lambda: net(x))
    assert torch.equal(logits, timms) and all(torch.equal(a, b) for a, b in zip(grads, timms_grads, strict=True))
    _, grads = logits_and_grads(net, lambda: ours(x, LESS, rng_keys=keys).logits)
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
    whole, less = ours.cost(), ours.cost(LESS)
    assert (less.total < whole.total) == (tokens != "all" or connections.startswith("shared_keys"))
    if "kept" in ours.gives:
        kept = ours.eval()(x, LESS, frozenset({"kept"}), keys).kept
        assert set(kept) == (set(blocks) if (tokens, connections) != ("all", "all") else set())
