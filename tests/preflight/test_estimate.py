"""`trilevel estimate`: laws of the arithmetic, what it refuses, and (slow) its word against real runs of 1, 2 and 4 processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT, lines
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.model.build import build_schedule
from trainer.preflight.check import check
from trainer.preflight.estimate import MeasuredRates, estimate, read

CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def settings(digits: Path) -> list[str]:
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "tracking.to=journal"]
    return [*data, "plan.plateaus=2", "epochs=40", "plan.warmup=5ep", "plan.length=30ep"]


@pytest.fixture
def config(digits):
    return load(CONFIG, settings(digits))


# dense 2 ms an image, then 1.5 and 1: the rows that `bench step` gives for this schedule
PASSES = {"ours": 0.001, "ours from epoch 0": 0.002, "ours from epoch 5": 0.002, "ours from epoch 20": 0.0015, "against": 0.002}
STEPS = 40 * 20  # floor(0.9 x 1438 / 64) an epoch


def test_hours_follow_from_the_plateaus_and_devices_divide_them(config):
    one, four = (estimate(config, MeasuredRates(PASSES), nodes) for nodes in (1, 4))
    assert one.steps == four.steps == STEPS
    seconds = 64 * 20 * (5 * 0.002 + 15 * 0.002 + 15 * 0.0015 + 5 * 0.001)
    assert one.hours * 3600 == pytest.approx(seconds) and four.hours == pytest.approx(one.hours / 4)
    assert one.bottleneck == four.bottleneck == "compute" and four.hours * four.devices == pytest.approx(one.hours)
    assert four.demand == pytest.approx(1000) and four.images_per_second * 4 == pytest.approx(STEPS * 64 / seconds * 4)
    assert one.demand == pytest.approx(1 / 0.001)


def test_multiply_adds_are_those_of_the_steps_where_examples_and_plan_change_at_different_times(digits: Path):
    """All examples for four epochs under a dense plan, then half of them at a quarter of the tokens."""
    words = [
        *settings(digits),
        "examples={method: random_fixed, removed: 0.5, anneal: 0.5}",
        "connections={}",
        "tokens.keep=0.25",
    ]
    config = load(CONFIG, [*words, "plan={method: staircase, stairs: [[4ep, 0.25, 1.0]]}", "epochs=8", "optim.warmup=1ep"])
    passes = {"ours": 0.001, "ours from epoch 0": 0.002, "against": 0.002}
    costs = {plateau.stretch.start: plateau.multiply_adds for plateau in check(config, 1).plateaus}
    shown = {epoch: 1438 - round(build_schedule(config).left_out(epoch) * 1438) for epoch in range(8)}
    assert len(set(shown.values())) == 2
    wanted = sum(64 * (images // 64) * costs[0.0 if epoch < 4 else 4.0] for epoch, images in shown.items())
    assert estimate(config, MeasuredRates(passes), 1).multiply_adds == pytest.approx(wanted)


def test_each_resource_can_be_the_bottleneck(config):
    assert estimate(config, MeasuredRates(PASSES, decode=0.1), 2, cores=4).bottleneck == "loader"
    assert estimate(config, MeasuredRates(PASSES, decode=0.1), 2, cores=4).hours * 3600 == pytest.approx(STEPS * 32 * 0.1 / 4)
    assert estimate(config, MeasuredRates(PASSES, engine=1.0), 2).bottleneck == "engine"
    slow = estimate(config, MeasuredRates(PASSES), 4, bandwidth=1e-3)
    assert slow.bottleneck == "all-reduce"
    travel = STEPS * 2 * 3 / 4 * 683_242 * 4 / 1e6  # parameters of the quickstart's network, 4 bytes each
    assert slow.parts["all-reduce"] * 3600 == pytest.approx(travel, rel=0.02)
    assert estimate(config, MeasuredRates(PASSES), 1, bandwidth=1e-3).parts["all-reduce"] == 0


def test_on_a_cpu_passes_and_decoding_share_the_cores(config):
    bench = MeasuredRates(PASSES, decode=0.001, cpu=True, threads=1)
    two, four = estimate(config, bench, 1, 2, cores=2), estimate(config, bench, 1, 4, cores=2)
    assert two.hours == pytest.approx(four.hours) and two.parts["loader"] > 0
    assert two.hours == pytest.approx(
        estimate(config, MeasuredRates(PASSES, cpu=True), 1, 2, cores=2).hours + two.parts["loader"]
    )


def test_facts_state_that_they_are_a_simulation_and_what_was_not_measured(config):
    found = estimate(config, MeasuredRates(PASSES), 2)
    facts = found.facts()
    assert facts["simulation"] is True and facts["bottleneck"] == "compute" and facts["bytes_per_second_per_node"] > 0
    table = found.table()
    assert "simulated and not measured" in str(table.title)
    assert [column.justify for column in table.columns] == ["left", "right", "left"]
    assert list(table.columns[0].cells) == [
        "steps", "hours", "device hours", "multiply-adds", "images/s per node", "MB/s per node", "images/s per core",
        *(f"{name} alone" for name in found.parts),
    ]  # fmt: skip
    assert "--bandwidth" in found.text() and "bench input" in found.text() and "short run" in found.text()


def test_what_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"no row 'ours from epoch 20'.*another schedule"):
        estimate(config, MeasuredRates({k: v for k, v in PASSES.items() if "20" not in k}), 1)
    with pytest.raises(ConfigError, match="--nodes 0: must be >= 1"):
        estimate(config, MeasuredRates(PASSES), 0)
    with pytest.raises(ConfigError, match="--bandwidth -1"):
        estimate(config, MeasuredRates(PASSES), 2, bandwidth=-1)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"a\.json.*bench step"):
        read([str(tmp_path / "a.json")])
    (tmp_path / "b.json").write_text(json.dumps({"ours": {"unit": "images/s", "cpu_ms": 1.0}}))
    with pytest.raises(ConfigError, match="no step times in it"):
        read([str(tmp_path / "b.json")])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_paper_against_real_runs_of_one_two_and_four_processes(digits, tmp_path, trilevel):
    """Bench, plan, run; the bound is wide, for other work on the machine hits the two at different times."""
    given = [*settings(digits), "control=0", "evaluate.every=0ep", "checkpoint.every=0ep", "data.workers=0", "epochs=6"]
    given += [
        "optim.warmup=1ep",
        "examples.window=3ep",
        "examples.updates=1",
        "plan.warmup=1ep",
        "plan.length=3ep",
        "log_every=5step",
    ]
    loader = ["--rows", "ours", "--passes", "3", "--workers", "0", "--json", "input.json"]
    trilevel(1, "bench", "step", CONFIG, *given, "--pairs", "5", "--json", "step.json", timeout=600)
    trilevel(1, "bench", "input", CONFIG, *given, *loader, timeout=600)
    trilevel(1, "train", CONFIG, *given, "name=short", "stop_at=30step", timeout=600)
    cores = len(os.sched_getaffinity(0))
    for world in (1, 2, 4):
        words = ["--nodes", "1", "--processes", str(world), "--cores", str(min(world, cores)), "--json", f"plan{world}.json"]
        words += ["--from", "step.json", "--from", "input.json", "--from", "runs/short", "--bandwidth", "0.5"]
        trilevel(1, "estimate", CONFIG, *given, *words, timeout=900)
        trilevel(world, "train", CONFIG, *given, f"name=real{world}", timeout=900)
        steps = lines(tmp_path / "runs" / f"real{world}", "step")
        images, seconds = (sum(line[key] for line in steps[1:]) for key in ("images", "seconds"))
        found = json.loads((tmp_path / f"plan{world}.json").read_text())
        ratio = images / seconds / found["images_per_second_per_node"]
        print(f"{world} process(es): real / paper images/s {ratio:.2f}")
        assert found["steps"] == steps[-1]["step"]
        assert 1 / 3 < ratio < 3, (world, ratio, found)
