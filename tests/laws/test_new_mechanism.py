"""A new mechanism is one file and one row in a literal dict: this file is the one file of five, one of each level and a schedule.

Each has a setting of its own. They train, resume and are audited through the real command line, and nothing else is registered.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sparsity.connections import CONNECTIONS
from sparsity.examples import EXAMPLES
from sparsity.examples.curriculum import Curriculum, ExampleSettings, TrainingRun
from sparsity.schedule import PLANS, PlanSettings
from sparsity.settings import ConnectionSettings, Count, Epochs, Keep, Network, Share, TokenSettings, setting
from sparsity.tokens import TOKENS
from sparsity.tokens.topk import select
from sparsity.types import QKV, BlockShape, Plan, Selection, Tokens, VisibleKeys
from sparsity.weights import WEIGHTS
from sparsity.weights.groups import Site, Weights
from sparsity.weights.magnitude import Magnitude
from sparsity.weights.pruning import PruneSettings, Pruning
from tests.conftest import ROOT, lines
from trainer.__main__ import main
from trainer.model.weights import load_weights


@dataclass(frozen=True)
class TurnSettings(ExampleSettings):
    parts: Count = setting(4, "an epoch leaves out one of so many parts of the data set, in turn")

    @property
    def left_out(self) -> float:
        return 1 / self.parts

    def build(self, run: TrainingRun) -> Turn:
        return Turn(self, run)


class Turn(Curriculum):
    name = "turn"

    def _select(self, epoch: int) -> Selection:
        parts = self.settings.parts
        return self._selection(np.arange(self.num_examples) % parts != epoch % parts)


@dataclass(frozen=True)
class LastSettings(TokenSettings):
    drop: Count = setting(1, "patches that leave at each block, the last ones")

    @property
    def fixed_by(self) -> str:
        return f"tokens.drop={self.drop}"

    def build(self, network: Network) -> Last:
        return Last(self.drop, network.carry_qkv)


@dataclass(frozen=True)
class Last:
    drop: int
    carry_qkv: bool

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> tuple[Tokens, QKV]:
        left = torch.arange(self.count(tokens.ids.shape[1], plan), device=tokens.ids.device)
        return select(tokens, qkv, left.expand(len(tokens.ids), -1), self.carry_qkv)

    def count(self, num_patches: int, plan: Plan) -> int:
        return num_patches - self.drop

    def work(self, place: BlockShape, plan: Plan) -> int:
        return 0


@dataclass(frozen=True)
class FirstKeysSettings(ConnectionSettings):
    keep: Keep = setting(1.0, "share of the keys that stay visible")
    least: Count = setting(1, "keys that stay visible whatever the share is")

    def build(self, network: Network) -> FirstKeys:
        return FirstKeys(self.least)


@dataclass(frozen=True)
class FirstKeys:
    least: int

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> Tokens:
        visible = tokens.num_prefix + self.visible(tokens.ids.shape[1], plan)
        return tokens.with_(keys=VisibleKeys(index=torch.arange(visible, device=tokens.ids.device).expand(len(tokens.ids), -1)))

    def visible(self, num_patches: int, plan: Plan) -> int:
        return max(self.least, int(num_patches * plan.keep_connections))

    def work(self, place: BlockShape, plan: Plan) -> int:
        return 0


@dataclass(frozen=True)
class HalfWay(PlanSettings):
    turn: Epochs = setting(
        1.0, "epoch from which half of what the final plan leaves out is left out, and all of it from twice that on"
    )
    first: Share = setting(0.5, "the share that is left out in the first part")

    def at(self, progress: float, final: Plan) -> Plan:
        done = 0.0 if progress < self.turn else self.first if progress < 2 * self.turn else 1.0
        return Plan(1 - done * (1 - final.keep_tokens), 1 - done * (1 - final.keep_connections))

    def borders(self, epochs: int) -> Sequence[float]:
        return [self.turn, 2 * self.turn]


@dataclass(frozen=True)
class OddSettings(PruneSettings):
    first: Count = setting(1, "the first group of each block that leaves; then every second one does")

    def _build(self, sites: Sequence[Site]) -> Pruning:
        return Odd(self, sites)


class Odd(Magnitude):
    settings: OddSettings

    def _chosen(self, weights: Weights) -> dict[str, torch.Tensor]:
        there = {site.name: site.counts() > 0 for site in self.sites}
        return {name: groups & (torch.arange(groups.shape[1]) % 2 != self.settings.first % 2) for name, groups in there.items()}


ROWS: tuple[tuple[dict[str, Any], str, type], ...] = (
    (EXAMPLES, "turn", TurnSettings),
    (TOKENS, "last", LastSettings),
    (CONNECTIONS, "first", FirstKeysSettings),
    (PLANS, "half_way", HalfWay),
    (WEIGHTS, "odd", OddSettings),
)

RECIPE = """
name: new
epochs: 3
log_every: 1step
control: 0
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 256, micro_batch: 128, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0}
optim: {lr: 2.0e-3, warmup: 1ep}
examples: {method: turn, parts: 3}
tokens: {method: last, drop: 2, blocks: [1, 2]}
connections: {method: first, keep: 0.5, least: 7}
plan: {method: half_way, turn: 1ep}
weights: {method: odd, keep: 0.5, block: [8, 8], layers: [mlp.fc1], prune: 1ep, first: 1}
engine: {kind: ddp, zero: 0, precision: float32}
evaluate: {every: 9ep}
tracking: {to: journal}
"""


@pytest.fixture
def recipe(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for methods, name, settings in ROWS:
        monkeypatch.setitem(methods, name, settings)
    (tmp_path / "new.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    return "new.yaml"


def test_five_new_mechanisms_train_resume_and_are_audited(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe, "--check"]) == 0
    assert "turn removes 33% of the examples" in capsys.readouterr().out
    assert main(["train", recipe, "stop_at=5step"]) == 0
    assert main(["train", recipe, "--resume"]) == 0
    run = Path("runs/new")
    steps = {line["step"]: line for line in lines(run, "step")}
    assert list(steps) == list(range(1, len(steps) + 1)) and all(np.isfinite(line["loss"]) for line in steps.values())
    shown = [line["facts"] for line in lines(run, "epoch")]
    assert {facts["method"] for facts in shown} == {"turn"} and len({facts["hash"] for facts in shown}) == 3
    plans = [(line["keep_connections"], line["tokens"]) for line in lines(run, "plateau")]
    assert [keep for keep, _ in plans][-1] == 0.5 and {keep for keep, _ in plans} == {1.0, 0.75, 0.5}
    assert plans[-1][1] == [17, 17, 15, 13], "two of 16 patches and [CLS] leave at each of two blocks"
    left = {(line["epoch"], line["event"]): line for line in lines(run, "weights")}
    assert [left[key]["kept"] for key in ((0, ""), (1, "pruned"), (2, ""))] == [1.0, 0.5, 0.5]
    weight = load_weights(run / "weights.safetensors")["blocks.3.mlp.fc1.weight"]
    assert weight[:, 0::2].ne(0).all() and weight[:, 1::2].eq(0).all()
    assert main(["audit", str(run)]) == 0


def test_their_settings_are_keys_like_any_other(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for override, words in (
        ("examples.parts=-1", "examples.parts=-1: must be >= 0"),
        ("examples.part=3", "unknown key; did you mean examples.parts?"),
        ("plan.turn=3step", "write it in epochs"),
        ("tokens.keep=0.5", "not a setting of tokens.method=last"),
        ("connections.drop=1", "connections.drop=1: unknown key"),
    ):
        assert main(["train", recipe, override]) == 2
        assert words in capsys.readouterr().err
    assert main(["train", recipe, "tokens.method=topk", "tokens.drop=1", "--check"]) == 2
    assert "tokens.drop=1: not a setting of tokens.method=topk; set tokens.method=last" in capsys.readouterr().err


class _Names(ast.NodeVisitor):
    """Comparisons with the name of a method, and collections of such names."""

    NAMES: ClassVar[set[str]] = {*EXAMPLES, *TOKENS, *CONNECTIONS, *PLANS, *WEIGHTS} - {"all", "random", "constant", "exact"}

    def __init__(self) -> None:
        self.found: list[str] = []

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare | ast.Set | ast.Dict | ast.Tuple):
            values = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.Constant) and n.value in self.NAMES]
            self.found += [f"line {node.lineno}: {value.value!r}" for value in values]
        super().generic_visit(node)


def test_the_trainer_names_no_method() -> None:
    """What is special about a method is an attribute of its settings; "all", "random", "exact" and "constant" mean other things too."""
    found = {}
    listed = {ROOT / "trainer/bench/gpu" / name for name in ("compared.py", "counts.py")}  # the networks that they compare
    for path in sorted(set((ROOT / "trainer").rglob("*.py")) - listed):
        names = _Names()
        names.visit(ast.parse(path.read_text()))
        if names.found:
            found[str(path.relative_to(ROOT))] = names.found
    assert not found
