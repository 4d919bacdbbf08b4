"""How well each correctness rule ranks examples: against a clean probe, which sees every image unmixed and unchanged once per epoch.

    python -m tests.support.rule_ranks [EPOCHS [SEED ...]]

scikit-learn's digits (1,797), a tiny ViT, small shifts. The first half of the epochs trains without mixing, so that the network knows the
digits when the window opens; the second half mixes as the DeiT recipe does (mixup .8, cutmix 1, switch .5, smoothing .1, drop path .1).
All rules watch the same run; so does the clean probe of all images, after each epoch. The rule `probe` sees a share of the same passes.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from sparsity.build import build
from sparsity.examples.curriculum import TrainingRun
from sparsity.examples.forgetting import Forgetting, ForgettingSettings
from sparsity.types import Observation, single_process
from trainer.config.load import parse
from trainer.data.augment.mixup import NO_MIX, draw_mix, mix_images
from trainer.data.loader.probed import probed
from trainer.model.build import build_objective

RULES = ("clear", "without_partner", "dominant", "authors")
SHARES = {
    f"probe {share:g}": share for share in (0.12, 0.2, 0.4)
}  # rule `probe` with `probe_share`; .12 of 25 epochs: 3 probes
REFERENCE = "every image"
BATCH = 64


class Ranked(NamedTuple):
    """correlation: Spearman's, of the scores with the probe's. easiest: mean score under the probe of the 20 % that the rule would remove
    first, as a share of the mean over all (1 = no better than chance; the probe's own 20 %: `ideal`). events: per example."""

    correlation: float
    easiest: float
    ideal: float
    events: float


def _config(rule: str) -> Any:
    augment = {"mixup": 0.8, "cutmix": 1.0, "mix_switch": 0.5, "smoothing": 0.1}
    return parse(
        {
            "name": "ranks",
            "model": {"name": "deit_tiny_patch16_224", "classes": 10, "image_size": 8},
            "data": {"train": "digits", "validation": "digits"},
            "augment": augment,
            "examples": {"rule": rule},
        }
    )


def ranks(epochs: int, seed: int = 0) -> dict[str, Ranked]:
    """Train `epochs`, and rank by what the window, their second half, counted."""
    data = load_digits()
    x, y = torch.from_numpy(data.images[:, None]).float().div(8).sub(1), torch.from_numpy(data.target).long()
    num = len(x) - len(x) % BATCH
    torch.manual_seed(seed)
    vit = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=10, drop_path_rate=0.1
    )
    torch.nn.init.trunc_normal_(vit.patch_embed.proj.weight, std=0.3)
    torch.nn.init.trunc_normal_(vit.pos_embed, std=0.5)
    model, rng = build(vit), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    objectives = {rule: build_objective(_config(rule)) for rule in RULES}
    run = TrainingRun(len(x), y.numpy(), epochs)
    watchers = {name: ForgettingSettings(ties="id").build(run) for name in (*RULES, *SHARES, REFERENCE)}
    everything = np.packbits(np.ones(len(x), dtype=bool), bitorder="little")
    mixing, step, opens = _config(RULES[0]).augment, 0, epochs // 2
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x))[:num]).view(-1, BATCH)
        for ids in order:
            shift = tuple(int(s) for s in rng.integers(-1, 2, 2))
            images, labels = x[ids].roll(shift, (2, 3)), y[ids]
            mix, ones = draw_mix(mixing, seed, step, 8) if epoch >= opens else NO_MIX, torch.ones(BATCH)
            record = model.train()(mix_images(images, mix, ones), rng_keys=ids + len(x) * step)
            losses = objectives["dominant"].losses(record.logits, objectives["dominant"].targets(labels, mix, ones))
            optimizer.param_groups[0]["lr"] = 3e-3 if epoch < opens else 5e-4
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            step += 1
            batch: Any = SimpleNamespace(labels=labels, ids=ids, copies=torch.zeros_like(ids), weights=ones)
            for rule in RULES if epoch >= opens else ():
                watchers[rule].observe(*objectives[rule].credit(batch, record, losses, mix))
        if epoch >= opens:
            with torch.no_grad():
                shown = order.flatten()  # what this epoch left over, the reference doesn't judge either
                right = model.eval()(x[shown]).logits.argmax(1) == y[shown]
                watchers[REFERENCE].observe(shown, Observation(right, right.float(), right.float(), torch.ones_like(right)))
                for name, share in SHARES.items():
                    ids = torch.from_numpy(probed(everything, len(x), seed, epoch, share))
                    watchers[name].observe(ids, objectives["clear"].probed(y[ids], torch.ones(len(ids)), model(x[ids])))
        for watcher in watchers.values():
            watcher.state_dict(single_process)  # folds what the epoch observed
    return _compared(watchers)


def _compared(watchers: dict[str, Forgetting]) -> dict[str, Ranked]:
    scores = {
        name: np.nan_to_num(watcher.scores(), nan=1.0, posinf=2.0) for name, watcher in watchers.items()
    }  # seen too rarely: not to be removed
    probe, share = scores[REFERENCE], len(scores[REFERENCE]) // 5
    chance = np.random.default_rng(0).permutation(len(probe))  # ties by chance here: ids follow the writers

    def easiest(score: np.ndarray) -> float:
        return float(probe[np.lexsort((chance, score))[:share]].mean() / probe.mean())

    return {
        name: Ranked(
            float(spearmanr(scores[name], probe).statistic),
            easiest(scores[name]),
            easiest(probe),
            float(watchers[name].events.mean()),
        )
        for name in (*RULES, *SHARES)
    }


def main(words: list[str]) -> None:
    epochs, seeds = int(words[0]) if words else 60, [int(word) for word in words[1:]] or [0, 1, 2]
    print(
        f"{epochs} epochs, seeds {seeds}; rank correlation with a clean probe, and how hard the easiest 20 % are for the probe (1 = chance)"
    )
    found = [ranks(epochs, seed) for seed in seeds]
    for rule in (*RULES, *SHARES):
        each = [one[rule] for one in found]
        correlation, easiest = ([getattr(one, name) for one in each] for name in ("correlation", "easiest"))
        of_seeds = [" ".join(f"{number:.3f}" for number in numbers) for numbers in (correlation, easiest)]
        print(
            f"{rule:16} correlation {np.mean(correlation):.3f} ({of_seeds[0]})  easiest {np.mean(easiest):.3f} ({of_seeds[1]})  "
            f"events per example {np.mean([one.events for one in each]):.2f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
