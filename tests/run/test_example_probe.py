"""The rule `probe`: it observes what a plain evaluation of the same images gives, and leaves the training to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparsity.types import DENSE, Observation, Plan, single_process
from tests.conftest import ROOT, environment, lines, slow_tests_of, torchrun
from tests.support import images as drawn
from tests.support.journals import lines as made_up
from tests.support.journals import write
from trainer.analysis.history import history
from trainer.analysis.report.savings import savings
from trainer.analysis.report.summary import summary
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.loader.build import clean_images, validation_set
from trainer.data.loader.probed import probed
from trainer.data.shards.index import Index, build_index
from trainer.engine.heartbeat import Heartbeat
from trainer.model.build import build_examples, build_model, build_objective, cost_of
from trainer.run.example_probe import ExampleProbe

TINY = {"name": "deit_tiny_patch16_224", "classes": 4, "image_size": 32, "drop_path": 0.1}
TINY["args"] = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "proj_drop_rate": 0.1}
N = 40
PROBE = {
    "method": "forgetting",
    "removed": 0.2,
    "swap": 0.1,
    "window": "6ep",
    "updates": 2,
    "rule": "probe",
    "probe_share": 0.5,
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(drawn.write_shards(tmp_path_factory.mktemp("shards"), [25, 15], broken=[7]), progress=False)


def config(epochs: int = 20, **more: Any) -> Config:
    sections = {"examples": PROBE, "tokens": {"method": "topk", "keep": 0.5, "blocks": [1, 2]}, "evaluate": {"batch": 6}}
    raw = drawn.config("x", model=TINY, **(sections | more)).resolved()
    return Config.model_validate(raw | {"epochs": epochs, "optim": raw["optim"] | {"warmup": "1ep"}})


def built(config: Config, index: Index, stop_at: int = 1000) -> tuple[ExampleProbe, Any, Any, list[dict[str, Any]]]:
    """A probe on one process, its model and examples, and the facts that it records; a stop is requested at the `stop_at`-th question."""
    model, written, asked = build_model(config).train(), [], []
    engine = SimpleNamespace(
        model=model, module=model, device=torch.device("cpu"), rank=0, world=1,
        forward=lambda images, *args: model(images, *args), all_reduce_sum=lambda tensor: tensor,
        read_delayed=lambda value: bool(value > 0), heartbeat=Heartbeat(0, 1, 0.0),
    )  # fmt: skip
    recorder: Any = SimpleNamespace(probed=lambda state, facts: written.append(facts))
    stop: Any = SimpleNamespace(requested=lambda: asked.append(1) or len(asked) >= stop_at)
    examples: Any = build_examples(config, index)
    settings = config.examples.probe
    clean = settings and clean_images(index, config, 0, 1, settings.probe_share)
    probe = ExampleProbe(config, index, engine, build_objective(config), examples, recorder, stop, clean)  # pyright: ignore
    return probe, model, examples, written


def after(epoch: int) -> TrainState:
    return TrainState(epoch=epoch + 1, step=4 * (epoch + 1))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_it_observes_what_an_evaluation_of_those_images_gives(index: Index, keep: float) -> None:
    settings = config(examples=PROBE | {"probe_keep": keep})
    probe, model, examples, written = built(settings, index)
    selection = examples.select(0, single_process)
    assert probe.observe(after(0), selection)
    ids = probed(selection.keep, N, settings.seed, 0, 0.5)
    model.eval()
    right, spread = {}, {}
    for batch in validation_set(index, settings, 0, 1):
        with torch.no_grad():
            output = model(normalise(batch.images, settings.augment), Plan(keep), frozenset({"cls_attention"}))
        attention = output.cls_attention
        numbers = (attention.var(1, correction=0) * attention.shape[1] ** 2).tolist()
        for number, label, guess, value in zip(batch.ids.tolist(), batch.labels, output.logits.argmax(1), numbers, strict=True):
            right[number], spread[number] = bool(label == guess), value
    examples.state_dict(single_process)
    counted = [number for number in ids.tolist() if number != 7]
    assert np.flatnonzero(examples.seen).tolist() == counted, "those of the keyed share, without the broken image"
    assert [bool(examples.memory[number] & 1) for number in counted] == [right[number] for number in counted]
    np.testing.assert_allclose(examples.spread[counted], [spread[number] for number in counted], rtol=1e-4)
    facts = written[0]
    assert (facts["epoch"], facts["probed"], facts["right"]) == (0, len(counted), sum(right[n] for n in counted))
    assert facts["multiply_adds"] == cost_of(model, Plan(keep))["multiply_adds"] and facts["seconds"] > 0
    assert facts["share"] == pytest.approx(len(counted) / selection.num_kept)


def test_it_leaves_weights_gradients_modes_and_random_numbers_to_the_bit(index: Index) -> None:
    probe, model, examples, _ = built(config(), index)
    selection = examples.select(0, single_process)
    model(torch.ones(2, 3, 32, 32), DENSE).logits.sum().backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    assert probe.observe(after(0), selection)
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled() == grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for p, before in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if before is None else torch.equal(p.grad, before)
    model.eval()
    assert probe.observe(after(1), selection) and not any(module.training for module in model.modules())


def test_it_comes_after_every_epoch_whose_observations_count(index: Index) -> None:
    """Twelve epochs to the second update, nothing before the first epoch or behind the last; an annealed run ends earlier."""

    def epochs(settings: Config) -> list[int]:
        probe, _, examples, written = built(settings, index)
        selection = examples.select(0, single_process)
        assert not probe.due(TrainState(epoch=2, batch=1))
        for epoch in range(-1, settings.epochs):
            assert probe.observe(after(epoch), selection)
        return [facts["epoch"] for facts in written]

    assert epochs(config()) == list(range(12))
    assert epochs(config(epochs=10)) == list(range(9))
    assert epochs(config(epochs=20, examples=PROBE | {"anneal": 0.5})) == list(range(9)), "epoch 10 shows everything"
    assert epochs(config(examples=PROBE | {"removed": 0.0})) == list(range(19)), "nothing is swapped: it counts to the end"
    assert epochs(config(examples={"method": "all"})) == []


def test_a_stop_leaves_nothing_observed(index: Index) -> None:
    probe, model, examples, written = built(config(), index, stop_at=2)
    selection = examples.select(0, single_process)
    assert not probe.observe(after(0), selection)
    assert model.training and not written and not examples.state_dict(single_process)["seen"].any()


def test_a_clean_row_counts_where_it_is_an_image_with_finite_logits() -> None:
    objective = build_objective(config())
    logits = torch.eye(4)[[0, 1, 1, 3, 2]] * 5
    logits[4, 0] = float("nan")
    output: Any = SimpleNamespace(logits=logits, cls_attention=None)
    found = objective.probed(torch.tensor([0, 1, 2, 3, 2]), torch.tensor([1.0, 1, 1, 0, 1]), output)
    assert isinstance(found, Observation) and found.clear is None
    assert found.correct[:4].tolist() == [True, True, False, True] and found.valid.tolist() == [True, True, True, False, False]
    assert objective.rule == "clear", "the training accuracy"


def test_its_time_and_multiply_adds_lower_the_savings_and_have_a_row(tmp_path: Path) -> None:
    """4 s of training at a dense step's half: 1.5x and half of the examples; 2 s of probes of 300 images in it."""
    journal = list(made_up())
    last = journal[-2]
    control = {"kind": "control", "attempt": 0, "time": last["time"], "step": 25, "step_speedup": 1.5, "measured": 0.6}
    control |= {"keep_tokens": 0.5, "keep_connections": 0.5, "bound_passes": 0.5, "note": "no significant overhead"}
    probe = {
        "kind": "probe",
        "attempt": 0,
        "time": last["time"],
        "step": 30,
        "epoch": 3,
        "probed": 300,
        "right": 200,
        "seconds": 2.0,
    }
    probe |= {"multiply_adds": 80.0, "keep_tokens": 1.0, "share": 0.1, "progress": 4.0}
    without, found = savings([*journal[:-1], control]), savings([*journal[:-1], control, probe])
    assert without.speedup == pytest.approx((8 + 4 * 2 * 1.5) / 12) and found.speedup == pytest.approx((8 + 4 * 2 * 1.5) / 14)
    assert found.bound == pytest.approx((800 + 400 * 2) / (800 + 400 * 0.5 + 300 * 0.8 / 3)) and found.timed == 1.0
    plain, run = write(tmp_path / "plain", journal), write(tmp_path / "tri", [*journal[:-1], control, probe, journal[-1]])
    assert history(run).last.trained == pytest.approx(history(plain).last.trained + 2.0)
    assert history(run).last.multiply_adds == pytest.approx(history(plain).last.multiply_adds + 300 * 80)
    assert (history(run).saved or 0) < (history(plain).saved or 0)
    rows = {row.what: row for row in summary(run).rows}
    assert rows["probe"].value == f"{100 * 2 / 14:.1f} %" and "300 clean images after 1 epochs" in rows["probe"].note
    assert "probes" in rows["time"].note
    plain_rows = {row.what: row for row in summary(plain).rows}
    assert "probe" not in plain_rows and "probes" not in plain_rows["time"].note


JOB = """
name: job
epochs: 4
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 16, drop_path: 0.1,
        args: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3, proj_drop_rate: 0.1}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 360, micro_batch: 90, workers: 0, lanes: 4, window: 256}
augment: {crop: shift, shift: 2, flip: 0.0, mixup: 0.2, cutmix: 1.0, erasing: 0.25}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9}
examples: {method: forgetting, removed: 0.2, swap: 0.05, window: 3ep, updates: 1, rule: probe, probe_share: 1.0}
tokens: {method: topk, keep: 0.7, blocks: [1]}
engine: {precision: float32}
control: 0
evaluate: {every: 0ep, batch: 200}
checkpoint: {every: 0ep}
tracking: {to: journal}
"""


STAGES = ("zero0", "zero2", "zero3", "bf16", "world2")  # of the slow test


def launched(folder: Path, digits: Path, processes: int, *scenes: str) -> str:
    (folder / "job.yaml").write_text(JOB.replace("DIGITS", str(digits)))
    words = [str(ROOT / "tests" / "support" / "jobs" / "probes.py"), "job.yaml", *scenes]
    done = subprocess.run(
        [sys.executable, *torchrun(processes), *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Runs of two processes in one start."""
    folder = tmp_path_factory.mktemp("probes")
    slow = STAGES if slow_tests_of(request) else ()
    out = launched(folder, digits, 2, "whole", "clear", "interrupted", *slow)
    assert "interrupted: preempted" in out and "interrupted: finished" in out
    return folder / "runs"


def steps(run: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["chain"]) for line in lines(run, "step")]


def probes(run: Path, *more: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in ("step", "epoch", "probed", "hash", *more)) for line in lines(run, "probe")]


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_training_beside_a_probe_is_the_training_without_bit_for_bit(runs: Path) -> None:
    """To the first exchange of examples, at epoch 3; then other examples are shown."""
    ours, theirs = steps(runs / "whole"), steps(runs / "clear")
    first = [line["step"] for line in lines(runs / "whole", "epoch")][-1]
    assert first == 9 and ours[:first] == theirs[:first]
    hashes = [[line["facts"]["hash"] for line in lines(runs / name, "epoch")] for name in ("whole", "clear")]
    assert hashes[0][:3] == hashes[1][:3] and hashes[0][3] != hashes[1][3], "the probe decides what is exchanged"
    assert not lines(runs / "clear", "probe")


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_interrupted_in_a_probe_is_uninterrupted(runs: Path) -> None:
    """A signal to one rank between two batches of the second probe: all ranks leave it and save; the resume probes again."""
    assert probes(runs / "interrupted", "right") == probes(runs / "whole", "right")
    assert [line["attempt"] for line in lines(runs / "interrupted", "probe")] == [0, 1, 1]
    assert steps(runs / "interrupted") == steps(runs / "whole")
    facts = [[line["facts"]["hash"] for line in lines(runs / name, "epoch")] for name in ("whole", "interrupted")]
    assert facts[0] == facts[1]


@pytest.mark.dist
@pytest.mark.slow  # `make test` has the rows of the rule under ZeRO 1 and 3 in tests/laws/test_every_mechanism.py
@pytest.mark.timeout(900)
def test_every_stage_and_any_world_probe_the_same_examples(runs: Path, digits: Path, tmp_path: Path) -> None:
    """Three processes, whose parts of the 1,150 images differ by one, and one."""
    launched(tmp_path, digits, 1, "world1")
    launched(tmp_path, digits, 3, "world3")
    whole = probes(runs / "whole")
    assert [(step, epoch, count) for step, epoch, count, _ in whole] == [(3, 0, 1150), (6, 1, 1150), (9, 2, 1150)]
    others = [runs / name for name in STAGES]
    others += [tmp_path / "runs" / name for name in ("world1", "world3")]
    for run in others:
        assert probes(run) == whole, run.name
        if run.name != "bf16":  # equal to rounding, so an argmax may tip
            base = runs / ("world2" if run.name.startswith("world") else "whole")
            ours, theirs = ([line["right"] for line in lines(one, "probe")] for one in (run, base))
            assert ours == pytest.approx(theirs, abs=3), run.name
            ours, theirs = ([step[1] for step in steps(one)][:9] for one in (run, base))
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, err_msg=run.name)
