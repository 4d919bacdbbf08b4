"""Evaluation: every image once on any world, timm's pixels, one set of weights at many densities."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
import torch
import yaml

from sparsity.types import DENSE, ModelOutput, Plan
from tests.support import images as drawn
from tests.support.journals import write as write_journal
from trainer.__main__ import main
from trainer.analysis.evaluation.adaptive_model import adaptive_model
from trainer.analysis.evaluation.densities import score
from trainer.analysis.evaluation.notes import class_notes
from trainer.config.errors import ConfigError
from trainer.data.loader.build import validation_set
from trainer.data.shards.index import build_index, open_index
from trainer.data.shards.reader import Reader
from trainer.model.build import build_model
from trainer.model.evaluate import evaluate
from trainer.model.weights import save_weights


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    pattern = drawn.write_shards(tmp_path_factory.mktemp("drawn"), [7, 1, 15], broken={9})
    build_index(pattern, progress=False)
    return pattern


def small(pattern: str, **sections: Any) -> Any:
    config = drawn.config(pattern, evaluate={"batch": 4}, **sections)
    args = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return config.changed(model={"args": args})


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_image_once_on_any_world(shards: str, world: int) -> None:
    config, index = small(shards), open_index(shards)
    seen: list[int] = []
    sums = []

    def spy(images: torch.Tensor, plan: Plan) -> ModelOutput:
        return ModelOutput(torch.eye(4)[torch.zeros(len(images), dtype=torch.int64)])  # always class 0

    for rank in range(world):
        batches = list(validation_set(index, config, rank, world))
        seen += [int(i) for b in batches for i, w in zip(b.ids, b.weights, strict=True) if w > 0]
        assert len(batches) == len(list(validation_set(index, config, 0, world))), "the same number of batches on every rank"
        scores = evaluate(spy, batches, DENSE, config.model.classes, config.augment, torch.device("cpu"))
        sums.append((scores.top1 * scores.images, scores.images, scores.broken))
    assert sorted(seen) == sorted(set(range(23)) - {9})
    right, images, broken = np.sum(sums, axis=0)
    assert (right, images, broken) == (6, 22, 1)  # ids 0, 4, ... 20 are class 0


def test_sums_over_ranks_are_those_of_one(shards: str) -> None:
    """Every number of the score, where an image is broken and classes have no image: on two ranks what it is on one."""
    config = small(shards, classes=8)  # images of the classes 0 to 3 only
    index = open_index(shards)

    bright: list[float] = []

    def answer(images: torch.Tensor, plan: Plan) -> ModelOutput:
        """Class 1 first for bright images, 6 for others; 3 among the five best; 0 and 2 not."""
        means = images.mean(dim=(1, 2, 3))
        bright.extend(means.tolist())
        logits = torch.tensor([3.0, 8.5, 2.0, 8.0, 7.0, 6.0, 5.0, 1.0]).expand(len(images), -1).clone()
        logits[torch.arange(len(images)), torch.where(means > 0.1, 1, 6)] = 9.0
        return ModelOutput(logits)

    def passes(ranks: int, add_up: Any) -> list[Any]:
        batches = [validation_set(index, config, rank, ranks) for rank in range(ranks)]
        return [
            evaluate(answer, one, DENSE, config.model.classes, config.augment, torch.device("cpu"), add_up(rank))
            for rank, one in enumerate(batches)
        ]

    def scored(ranks: int) -> list[Any]:
        """What each rank holds when all have added what they have: first gathered, then handed to each."""
        sent: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
        passes(ranks, lambda rank: lambda sums: sent[rank].append(sums.clone()) or sums)
        totals = [torch.stack(parts).sum(0) for parts in zip(*sent, strict=True)]
        left = [iter(totals) for _ in range(ranks)]
        return passes(ranks, lambda rank: lambda sums: sums.copy_(next(left[rank])))

    (one,) = scored(1)
    labels = [i % 4 for i in range(23)]
    right = [label == 1 and mean > 0.1 for label, mean in zip(labels, bright, strict=False)]
    right[9] = False  # broken, of class 1
    assert (one.images, one.broken) == (22, 1) and 0 < sum(right) < 5
    assert one.top1 == pytest.approx(sum(right) / 22)
    assert one.top5 == pytest.approx((5 + labels.count(3)) / 22)
    assert one.per_class[:4] == [0.0, sum(right) / 5, 0.0, 0.0] and all(math.isnan(it) for it in one.per_class[4:])
    assert one.worst_class == 0.0
    for two in scored(2):
        assert (two.top1, two.top5, two.worst_class, two.images, two.broken) == (one.top1, one.top5, 0.0, 22, 1)
        assert two.per_class[:4] == one.per_class[:4] and two.loss == pytest.approx(one.loss)
    alone = passes(2, lambda rank: lambda sums: sums)
    assert len({one.per_class[1], *(part.per_class[1] for part in alone)}) == 3, "each rank alone has another accuracy"


def test_the_worst_class_is_one_that_has_images(shards: str) -> None:
    config = small(shards)

    def batches(labels: list[int]) -> Any:
        whole = next(iter(validation_set(open_index(shards), config, 0, 1)))
        return [whole._replace(labels=torch.tensor(labels), weights=torch.ones(4))]

    def first(images: torch.Tensor, plan: Plan) -> ModelOutput:
        return ModelOutput(torch.eye(4)[torch.tensor([1, 1, 2, 2])])

    scores = evaluate(first, batches([1, 2, 2, 2]), DENSE, config.model.classes, config.augment, torch.device("cpu"))
    assert math.isnan(scores.per_class[0]) and scores.worst_class == pytest.approx(2 / 3)


def test_the_score_is_timms_own_evaluation(shards: str, tmp_path: Path) -> None:
    """The same weights, timm's transform on PIL images, timm's forward: the same logits to the bit."""
    config, index = small(shards), open_index(shards)
    torch.manual_seed(3)
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3
    )
    save_weights(tmp_path / "weights.safetensors", network.state_dict())
    transform = timm.data.create_transform(32, is_training=False, interpolation="bicubic", crop_pct=0.875)
    network.eval()
    right = 0
    for example, data in enumerate(Reader(index).read(np.arange(23))):
        if example == 9:
            continue

        image = PIL.Image.open(io.BytesIO(bytes(data))).convert("RGB")
        with torch.no_grad():
            right += int(network(transform(image)[None]).argmax()) == index.labels[example]
    rows = score(str(tmp_path / "weights.safetensors"), config)
    assert rows.rows[0].scores.top1 == right / 22 and rows.rows[0].scores.images == 22


def test_one_set_of_weights_at_many_densities(
    shards: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small(shards, tokens={"method": "topk", "keep": 0.7, "blocks": [1, 2]})
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3
    )
    save_weights("weights.safetensors", network.state_dict())

    Path("c.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert main(["eval", "weights.safetensors", "c.yaml", "--densities", "1.0,0.7,0.5", "--json", "out.json"]) == 0
    found = json.loads(Path("out.json").read_text())
    assert [(r["density"], r["tokens"]) for r in found["rows"]] == [(1.0, 17), (0.7, 10), (0.5, 5)]
    costs = [r["gmacs"] for r in found["rows"]]
    assert costs == sorted(costs, reverse=True) and found["images"] == 22
    assert "GMACs" in capsys.readouterr().out
    assert main(["eval", "weights.safetensors", "c.yaml", "tokens.method=all", "--densities", "0.5"]) == 2
    assert "the configuration does not prune tokens" in capsys.readouterr().err
    merging = ["tokens.method=tome", "tokens.merged=2"]
    assert main(["eval", "weights.safetensors", "c.yaml", *merging, "--densities", "0.9,0.5"]) == 2
    assert "removes the same number of tokens at every density" in capsys.readouterr().err
    hidden = [
        "connections.method=exact",
        "connections.keep=0.5",
        "--json",
        "out.json",
    ]  # a density is about tokens, not connections
    found = []
    for words in ([], ["--densities", "0.7"]):
        assert main(["eval", "weights.safetensors", "c.yaml", *hidden, *words]) == 0
        found += json.loads(Path("out.json").read_text())["rows"]
    assert [(row["density"], row["connections"]) for row in found] == [(0.7, 0.5), (0.7, 1.0)]
    assert main(["eval", "weights.safetensors", "c.yaml", "--densities", "1,abc"]) == 2
    assert "must be keep ratios in (0, 1]" in capsys.readouterr().err
    assert main(["eval", "weights.safetensors", "c.yaml", "model.classes=12"]) == 2
    assert "the CONFIG these weights were trained with" in capsys.readouterr().err
    assert main(["eval", "timm:deit_tiny_patch16_224", "c.yaml"]) == 2
    assert "model.classes=4: timm:" in capsys.readouterr().err
    assert main(["eval", "weights.safetensors"]) == 2 and "names no images; add a CONFIG" in capsys.readouterr().err
    assert main(["eval", "timm:vit_tinny_patch16_224", "c.yaml"]) == 2
    assert "did you mean vit_tiny_patch16_224" in capsys.readouterr().err


def test_a_run_is_scored_under_its_own_plan_too(shards: str, tmp_path: Path) -> None:
    """With densities alone no row was the run's own number: they keep all connections."""
    levels: Any = {
        "tokens": {"method": "topk", "keep": 0.5, "blocks": [1, 2]},
        "connections": {"method": "shared_keys", "keep": 0.5},
    }
    config = small(shards, **levels)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    save_weights(tmp_path / "weights.safetensors", build_model(config).vit.state_dict())
    alone = score(str(tmp_path), None).rows[0]
    found = score(str(tmp_path), None, [1.0, 0.5]).rows
    assert [(row.selection, row.density, row.connections) for row in found] == [
        ("topk", 1.0, 1.0), ("topk", 0.5, 1.0), ("run's own plan", 0.5, 0.5)
    ]  # fmt: skip
    assert found[-1].scores.per_class == alone.scores.per_class and found[-1].gmacs == alone.gmacs
    own = score(str(tmp_path), None, [0.5], ["connections.method=all"]).rows
    assert len(own) == 1, "the density is the run's own plan"


def test_images_with_other_class_names_than_the_runs_are_named(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]

    def notes(trained: list[str], here: list[str]) -> list[str]:
        run = tmp_path / "-".join([*trained, "in", *here])
        write_journal(run, [{"kind": "start", "time": 1.0, "attempt": 0, "classes": trained}])
        return list(class_notes(run, SimpleNamespace(classes=here)))  # pyright: ignore[reportArgumentType]

    assert notes(names, names) == notes([], names) == notes(["0", "1", "2"], ["0", "1"]) == []
    assert list(class_notes(tmp_path, None)) == list(class_notes(None, None)) == []  # pyright: ignore[reportArgumentType]
    (found,) = notes(names, ["ant", "cat"])
    assert "the run has 3, these images 2; class 1 is 'bee' in the run and 'cat' here. Scores compare class numbers" in found
    assert "the run has 3, these images 2. Scores" in notes(names, ["ant", "bee"])[0]
    assert "class 0 is 'ant' in the run and '0' here" in notes(names, ["0", "1", "2"])[0]


def test_tokens_of_a_swin_are_those_after_its_last_selection_and_a_resnet_has_none(shards: str, tmp_path: Path) -> None:
    swin = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 2, 2]}
    models: Any = {
        "swin_tiny_patch4_window7_224": (swin, {"tokens": {"method": "topk", "blocks": [2], "position": "block"}}),
        "resnet18": ({"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, {}),
    }
    found = {}
    for name, (args, levels) in models.items():
        config = drawn.config(shards, evaluate={"batch": 4}, **levels).changed(model={"name": name, "args": args})
        save_weights(tmp_path / f"{name}.safetensors", build_model(config).network.state_dict())
        found[name] = config, str(tmp_path / f"{name}.safetensors")
    config, path = found["swin_tiny_patch4_window7_224"]
    assert [row.tokens for row in score(path, config, [1.0, 0.5]).rows] == [16, 8]
    config, path = found["resnet18"]
    results = score(path, config)
    assert results.rows[0].tokens == 0 and [list(results.table().columns[n].cells) for n in (3, 4, 5)] == [["-"]] * 3
    for settings, expected in (
        ({}, r"--densities \[0.5\]: ResNet has no tokens to select; evaluate it without --densities"),
        ({"adaptive": True}, "ResNet has no tokens to select"),
    ):
        with pytest.raises(ConfigError, match=expected):
            score(path, config, [0.5], **settings)
    with pytest.raises(ConfigError, match=r"ResNet has no tokens to select by mass; choose a network of vit_\*"):
        adaptive_model(config, build_model(config))
