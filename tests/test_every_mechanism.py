"""One suite over every mechanism of levels 2 and 3: a new one joins by its row in TOKENS or CONNECTIONS.

Identity at 1, less where less is asked, gradients, gradient checkpointing, drop path, independence of batch mates, training, and
torch.compile without graph breaks and with the gradients of eager. Costs are held in test_cost, level 1 in test_examples.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from sparsity.methods import CONNECTIONS, TOKENS, build
from sparsity.types import DENSE, Plan
from tests.families import images, logits_and_grads, tiny

LESS = Plan(0.6, 0.4)
ALL = frozenset({"kept", "keys", "cls_attention", "importance:1"})
PAIRS = list(product(TOKENS, CONNECTIONS))
# Every mechanism once, each with another partner; all pairs in `make test-all`.
SOME = {(name, list(CONNECTIONS)[i % len(CONNECTIONS)]) for i, name in enumerate(TOKENS)}
SOME |= {(list(TOKENS)[(i + 1) % len(TOKENS)], name) for i, name in enumerate(CONNECTIONS)}
SOME_THEN_ALL = [pytest.param(*pair, marks=() if pair in SOME else pytest.mark.slow) for pair in PAIRS]

each_pair = pytest.mark.parametrize(("tokens", "connections"), PAIRS)


def sparse(tokens: str, connections: str, *, blocks=(0, 1), **args):
    torch.manual_seed(0)
    vit = tiny(**args).train()
    return vit, build(vit, tokens=tokens, connections=connections, blocks=blocks)


def same(ours, theirs) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_pair
def test_identity_at_one(tokens, connections):
    """Bitwise timm: logits and gradients, drop path on."""
    vit, model = sparse(tokens, connections, drop_path_rate=0.5)
    x = images(vit)
    logits, grads = logits_and_grads(vit, lambda: model(x, DENSE, ALL).logits)
    timms, timms_grads = logits_and_grads(vit, lambda: vit(x))
    assert torch.equal(logits, timms) and same(grads, timms_grads)


@each_pair
def test_less_is_left_as_counted(tokens, connections):
    """Tokens and keys after each selection are those that the mechanism counts; ids are patches, each once."""
    vit, model = sparse(tokens, connections)
    record = model(images(vit), LESS, ALL, torch.arange(4))
    left = 16
    for block in (0, 1) if record.kept else ():
        left = model.reduce.count(left, LESS)
        ids = record.kept[block]
        assert ids.shape == (4, left) and all(len(set(row)) == left for row in ids.tolist())
        if block in record.keys:
            keys = record.keys[block]
            assert (keys.mask is None) != (keys.index is None)
            if keys.index is not None:
                assert keys.index.shape == (4, 1 + model.connect.visible(left, LESS))
    assert record.cls_attention.shape == (4, model.reduce.count(16, LESS) if tokens == "all" else left)
    assert (tokens == "all") == (left == 16) and (connections == "all") == (not record.keys)


@each_pair
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(tokens, connections):
    vit, model = sparse(tokens, connections, drop_path_rate=0.5)
    x, draw = images(vit, 8), torch.arange(8)
    logits, grads = logits_and_grads(vit, lambda: model(x, LESS, draw=draw).logits)
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    vit.set_grad_checkpointing()
    again, grads_again = logits_and_grads(vit, lambda: model(x, LESS, draw=draw).logits)
    assert torch.equal(logits, again) and same(grads, grads_again)
    by_chance, grads_by_chance = logits_and_grads(vit, lambda: model(x, LESS).logits)
    vit.set_grad_checkpointing(False)
    again, grads_again = logits_and_grads(vit, lambda: model(x, LESS).logits)
    assert torch.equal(by_chance, again) and same(grads_by_chance, grads_again)


@each_pair
def test_an_image_does_not_depend_on_its_batch_mates(tokens, connections):
    vit, model = sparse(tokens, connections, drop_path_rate=0.5)
    x, draw = images(vit, 5), torch.arange(5)
    whole = model(x, LESS, draw=draw).logits
    alone = torch.cat([model(x[i : i + 1], LESS, draw=draw[i : i + 1]).logits for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-5)


@each_pair
def test_bfloat16_autocast(tokens, connections):
    """Runs, stays near float32 in kind (finite, same counts), and is timm's own result where all is kept."""
    vit, model = sparse(tokens, connections)
    x, draw = images(vit), torch.arange(4)
    vit.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x).logits, vit(x))
        record = model(x, LESS, ALL, draw)
    assert record.logits.isfinite().all() and record.cls_attention.dtype == record.importance.dtype == torch.float32
    exact = model(x, LESS, ALL, draw)
    assert [ids.shape for ids in record.kept.values()] == [ids.shape for ids in exact.kept.values()]


@pytest.mark.parametrize(("tokens", "connections"), SOME_THEN_ALL)
def test_learns_digits(tokens, connections):
    """Real digits by heart: 64 of them, 8x8 pixels in 2x2 patches, 35 steps; the loss falls from 2.3, that of guessing, below .7."""
    data = load_digits()
    x = torch.from_numpy(data.images[:64, None]).float().div(8).sub(1)
    y = torch.from_numpy(data.target[:64])
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=10, drop_path_rate=0.1
    )
    torch.nn.init.trunc_normal_(vit.patch_embed.proj.weight, std=0.3)
    torch.nn.init.trunc_normal_(vit.pos_embed, std=0.5)
    model = build(vit, tokens=tokens, connections=connections, blocks=(0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    losses = []
    for step in range(35):
        loss = F.cross_entropy(model(x, LESS, draw=torch.arange(64) + 64 * step).logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2 and losses[-1] < 0.7


@pytest.mark.parametrize(("tokens", "connections"), SOME_THEN_ALL)
def test_compiles_whole_with_the_gradients_of_eager(tokens, connections):
    """One graph without breaks, forward and backward (traced and differentiated ahead of time; code generation: test_compile)."""
    torch.compiler.reset()
    vit, model = sparse(tokens, connections, blocks=(0,), depth=2, drop_path_rate=0.5)
    model.compile(fullgraph=True, backend="aot_eager")
    x, draw = images(vit), torch.arange(4)
    logits, grads = logits_and_grads(vit, lambda: model.forward(x, LESS, draw=draw).logits)
    ours, our_grads = logits_and_grads(vit, lambda: model(x, LESS, draw=draw).logits)
    assert torch.allclose(ours, logits, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(our_grads, grads, strict=True))
