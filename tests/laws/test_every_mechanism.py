"""One suite over every mechanism of the four levels: a new one joins by its row in TOKENS, CONNECTIONS, EXAMPLES or WEIGHTS.

Identity at 1, less at lower keep ratios, gradients, gradient checkpointing, drop path, independence of batch mates, bf16, training on
digits beside every other level, torch.compile without graph breaks and with the gradients of eager; and whole runs of the real trainer on
two processes with DeepSpeed's ZeRO 1, 2 and 3, resumed bit for bit. Costs are held in test_cost, more of level 1 in test_examples.
"""

import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from sparsity.build import build
from sparsity.connections import CONNECTIONS
from sparsity.examples import EXAMPLES, kept_ids
from sparsity.examples.curriculum import TrainingRun
from sparsity.tokens import TOKENS
from sparsity.types import DENSE, Observation, Plan, single_process
from sparsity.weights import WEIGHTS
from tests.conftest import ROOT, environment, lines, torchrun
from tests.support.methods import fitting
from tests.support.vits import images, logits_and_grads, tiny
from trainer.data.shards.index import build_index

LESS = Plan(0.6, 0.4)
ALL = frozenset({"kept", "keys", "cls_attention", "importance:1"})
PAIRS = list(product(TOKENS, CONNECTIONS))
STAGES = (1, 2, 3)
PROBE = "forgetting examples.rule=probe examples.probe_share=1.0"  # forgetting by the rule with passes of its own


def each_once(*levels: Sequence) -> list[tuple]:
    """Rows with every name of every level at least once, the short levels going round, each time with another partner."""
    rows = max(len(level) for level in levels)
    return [
        tuple(list(level)[(i + j + j * (i // len(level))) % len(level)] for j, level in enumerate(levels)) for i in range(rows)
    ]


def every_pair(*levels: Sequence) -> list[tuple]:
    """Rows in which any two names of two levels meet: greedily, the row with the most new pairs first."""
    rows = list(product(*levels))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def some_then_all(*levels: Sequence) -> list:
    """Every mechanism once in `make test`, every pair of two levels in `make test-all`."""
    some = each_once(*levels)
    return [*some, *(pytest.param(*row, marks=pytest.mark.slow) for row in every_pair(*levels) if row not in some)]


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
    output = model(images(vit), LESS, ALL, torch.arange(4))
    left = 16
    for block in (0, 1) if output.kept else ():
        left = model.reduce.count(left, LESS)
        ids = output.kept[block]
        assert ids.shape == (4, left) and all(len(set(row)) == left for row in ids.tolist())
        if block in output.keys:
            keys = output.keys[block]
            assert (keys.mask is None) != (keys.index is None)
            if keys.index is not None:
                assert keys.index.shape == (4, 1 + model.connect.visible(left, LESS))
    assert output.cls_attention.shape == (4, model.reduce.count(16, LESS) if tokens == "all" else left)
    assert (tokens == "all") == (left == 16) and (connections == "all") == (not output.keys)


@each_pair
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(tokens, connections):
    vit, model = sparse(tokens, connections, drop_path_rate=0.5)
    x, rng_keys = images(vit, 8), torch.arange(8)
    logits, grads = logits_and_grads(vit, lambda: model(x, LESS, rng_keys=rng_keys).logits)
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    vit.set_grad_checkpointing()
    again, grads_again = logits_and_grads(vit, lambda: model(x, LESS, rng_keys=rng_keys).logits)
    assert torch.equal(logits, again) and same(grads, grads_again)
    by_chance, grads_by_chance = logits_and_grads(vit, lambda: model(x, LESS).logits)
    vit.set_grad_checkpointing(False)
    again, grads_again = logits_and_grads(vit, lambda: model(x, LESS).logits)
    assert torch.equal(by_chance, again) and same(grads_by_chance, grads_again)


@each_pair
def test_an_image_does_not_depend_on_its_batch_mates(tokens, connections):
    vit, model = sparse(tokens, connections, drop_path_rate=0.5)
    x, rng_keys = images(vit, 5), torch.arange(5)
    whole = model(x, LESS, rng_keys=rng_keys).logits
    alone = torch.cat([model(x[i : i + 1], LESS, rng_keys=rng_keys[i : i + 1]).logits for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-5)


@each_pair
def test_bfloat16_autocast(tokens, connections):
    """Runs, stays near float32 in kind (finite, same counts), and is timm's own result where all is kept."""
    vit, model = sparse(tokens, connections)
    x, rng_keys = images(vit), torch.arange(4)
    vit.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x).logits, vit(x))
        output = model(x, LESS, ALL, rng_keys)
    assert output.logits.isfinite().all() and output.cls_attention.dtype == output.importance.dtype == torch.float32
    exact = model(x, LESS, ALL, rng_keys)
    assert [ids.shape for ids in output.kept.values()] == [ids.shape for ids in exact.kept.values()]


@pytest.mark.parametrize(("tokens", "connections", "examples"), some_then_all(TOKENS, CONNECTIONS, EXAMPLES))
def test_learns_digits(tokens, connections, examples):
    """Real digits by heart: 64 of them, 8x8 pixels in 2x2 patches, 45 passes with all three levels on; what the last third of the passes
    showed is right nearly always, where guessing is right one time in ten."""
    data = load_digits()
    x = torch.from_numpy(data.images[:64, None]).float().div(8).sub(1)
    y = torch.from_numpy(data.target[:64])
    settings = fitting(EXAMPLES, examples, removed=0.25, swap=0.05, window=10.0, updates=3, anneal=0.1)
    level = settings.build(TrainingRun(64, y.numpy(), epochs=45))
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=10, drop_path_rate=0.1
    )
    torch.nn.init.trunc_normal_(vit.patch_embed.proj.weight, std=0.3)
    torch.nn.init.trunc_normal_(vit.pos_embed, std=0.5)
    model = build(vit, tokens=tokens, connections=connections, blocks=(0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    outputs, losses, shown = frozenset({"cls_attention"}), [], set()
    for epoch in range(45):
        selection = level.select(epoch, single_process)
        ids = torch.from_numpy(kept_ids(selection, 64))
        shown |= set(ids.tolist()) if epoch >= 30 else set()
        weights = torch.ones(len(ids)) if selection.weight is None else torch.from_numpy(selection.weight)[ids]
        output = model(x[ids], LESS, outputs, ids + 64 * epoch)
        each = F.cross_entropy(output.logits, y[ids], reduction="none")
        optimizer.zero_grad()
        (each * weights).sum().div(weights.sum()).backward()
        optimizer.step()
        losses.append(each.mean().item())
        right = output.logits.argmax(1) == y[ids]
        level.observe(ids, Observation(right, each.detach(), output.cls_attention.var(1), torch.ones_like(right)))
    assert losses[0] > 2 and np.mean(losses[-5:]) < 0.7
    ids = torch.tensor(sorted(shown))
    with torch.no_grad():
        assert (model.eval()(x[ids], LESS, rng_keys=ids).logits.argmax(1) == y[ids]).float().mean() > 0.85


@pytest.mark.parametrize(("tokens", "connections"), some_then_all(TOKENS, CONNECTIONS))
def test_compiles_whole_with_the_gradients_of_eager(tokens, connections):
    """One graph without breaks, forward and backward (traced and differentiated ahead of time; code generation: test_compile)."""
    torch.compiler.reset()
    vit, model = sparse(tokens, connections, blocks=(0,), depth=2, drop_path_rate=0.5)
    model.compile(fullgraph=True, backend="aot_eager")
    x, rng_keys = images(vit), torch.arange(4)
    logits, grads = logits_and_grads(vit, lambda: model.forward(x, LESS, rng_keys=rng_keys).logits)
    ours, our_grads = logits_and_grads(vit, lambda: model(x, LESS, rng_keys=rng_keys).logits)
    assert torch.allclose(ours, logits, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(our_grads, grads, strict=True))


RECIPE = """
name: job
epochs: 4
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 8, drop_path: 0.1,
        args: {patch_size: 2, embed_dim: 48, depth: 4, num_heads: 3}}
data: {train: "DIGITS/train-00000[0-1].tar", validation: "DIGITS/validation-000000.tar", batch: 64, micro_batch: 32, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0, mixup: 0.2, cutmix: 1.0}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0}
examples: {method: forgetting, removed: 0.4, swap: 0.05, window: 3ep, updates: 1, anneal: 0.1, rule: dominant}
tokens: {method: topk, keep: 0.6, blocks: [1, 2]}
connections: {method: exact, keep: 0.4}
plan: {method: staircase, stairs: [[1ep, 0.8, 0.8], [2ep, 0.6, 0.4]]}
weights: {method: admm, keep: 0.5, block: [16, 16], prune: 2ep}
engine: {precision: float32}
control: 0
evaluate: {every: 0ep}
checkpoint: {every: 5step, keep: 9}
tracking: {to: journal}
"""


def trained(digits: Path, folder: Path, rows: list[tuple]) -> dict[tuple, tuple[Path, Path]]:
    """Each (tokens, connections, examples, weights, ZeRO stage) trained whole, and resumed from its fifth step: the two run directories."""
    config = folder / "job.yaml"
    config.write_text(RECIPE.replace("DIGITS", str(digits)))
    for pattern in ("train-00000[0-1].tar", "validation-000000.tar"):
        build_index(str(digits / pattern), progress=False)
    runs = []
    for number, (tokens, connections, examples, weights, zero) in enumerate(rows):
        methods = f"tokens.method={tokens} connections.method={connections} examples.method={examples} weights.method={weights}"
        runs.append(f"run-{number} {methods} engine.zero={zero}")
    words = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), str(config), "5", *runs]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    paths = [(folder / "runs" / f"run-{n}", folder / "runs" / f"run-{n}-resumed") for n in range(len(rows))]
    return dict(zip(rows, paths, strict=True))


def hold(runs: dict[tuple, tuple[Path, Path]]) -> None:
    """Interrupted = uninterrupted, bit for bit; all rows that differ in the ZeRO stage only lose the same, to rounding."""
    alike: dict[tuple, np.ndarray] = {}
    for row, paths in runs.items():
        whole, resumed = ({line["step"]: line for line in lines(path, "step")} for path in paths)
        names = ("loss", "grad_norm", "chain", "train_top1", "keep_tokens", "keep_connections")
        assert list(whole) == list(range(1, len(whole) + 1)) and list(resumed) == list(range(6, len(whole) + 1)), row
        for step, line in resumed.items():
            assert [line[name] for name in names] == [whole[step][name] for name in names], (row, step)
        last, again = (lines(path, "epoch")[-1]["facts"] for path in paths)
        assert last == again and last["method"] == row[2].split()[0], row
        clean, later = ([(line["epoch"], line["right"], line["hash"]) for line in lines(path, "probe")] for path in paths)
        assert len(clean) == (3 if row[2] == PROBE else 0) and bool(later) == bool(clean), row
        assert clean[len(clean) - len(later) :] == later, (row, "from the epoch of the checkpoint on")
        left, left_again = (
            [(line["epoch"], line["event"], line["kept"], line["norms"]) for line in lines(path, "weights")] for path in paths
        )
        assert left[len(left) - len(left_again) :] == left_again and [now[2] for now in left[2:]] == [0.5] * len(left[2:]), row
        assert bool(left) == (row[3] != "all") and [now[1] for now in left].count("pruned") == bool(left), row
        ended, ended_again = (lines(path, "eval")[-1] for path in paths)
        assert (ended["loss"], ended["top1"]) == (ended_again["loss"], ended_again["top1"]), row
        losses = np.array([line["loss"] for line in whole.values()])
        np.testing.assert_allclose(losses, alike.setdefault(row[:-1], losses), rtol=5e-4, err_msg=str(row))


@pytest.mark.dist
@pytest.mark.timeout(900)  # ten runs in one start: seconds on a free machine
def test_every_mechanism_trains_and_resumes_under_deepspeed(digits, tmp_path):
    """Each mechanism once and each ZeRO stage, mixing and drop path on, beside other levels, two real processes."""
    hold(trained(digits, tmp_path, each_once(TOKENS, CONNECTIONS, [*EXAMPLES, PROBE], WEIGHTS, STAGES)))


@pytest.mark.slow
@pytest.mark.dist
def test_every_two_mechanisms_of_two_levels_and_every_stage(digits, tmp_path):
    levels = every_pair(TOKENS, CONNECTIONS, [*EXAMPLES, PROBE], WEIGHTS)
    hold(
        trained(
            digits, tmp_path, [(*row, stage) for i, row in enumerate(levels) for stage in (STAGES if i < 5 else (1 + i % 3,))]
        )
    )
