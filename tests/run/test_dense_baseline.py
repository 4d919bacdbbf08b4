"""The dense baseline of a run: it changes nothing, keeps to its budget, and records what it measured and what the run saved."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsity import attention
from sparsity.plan_mix import PlanMix
from sparsity.types import DENSE, Plan
from sparsity.vit import SparseViT
from tests.conftest import ROOT, environment, lines, torchrun
from tests.support import images as drawn
from tests.support.journals import lines as made_up
from tests.support.journals import write
from trainer.analysis.report.savings import savings, savings_of
from trainer.analysis.report.summary import summary
from trainer.config.run_config import Config
from trainer.data.order import BatchSplit
from trainer.engine.heartbeat import Heartbeat
from trainer.model.build import build_model, build_objective, build_schedule
from trainer.run import dense_baseline
from trainer.run.dense_baseline import WARM, WATCHED, DenseBaseline
from trainer.telemetry.meters import StepClock

SPARSE = Plan(0.5, 1.0)
TINY = {"name": "deit_tiny_patch16_224", "classes": 4, "image_size": 32, "drop_path": 0.1}
TINY["args"] = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "proj_drop_rate": 0.1}


def tiny(**more: Any) -> Config:
    tokens = {"method": "topk", "keep": 0.5, "blocks": [1, 2]}
    return drawn.config(
        "nowhere", **{"model": TINY, "tokens": tokens, "engine": {"kind": "ddp", "zero": 0, "precision": "float32"}} | more
    )


def control(config: Config, engine: Any) -> DenseBaseline:
    return DenseBaseline(config.control, build_schedule(config), engine, build_objective(config), frozenset({"cls_attention"}))


def engine_of(config: Config) -> Any:
    """What a DenseBaseline takes of an engine, around a new network."""
    engine = SimpleNamespace(
        module=build_model(config).train(),
        on_gpu=False,
        device=torch.device("cpu"),
        batch_split=BatchSplit(4, 2, 8),
        settings=config.engine,
        heartbeat=Heartbeat(0, 1, 0.0),
    )
    engine.forward_unwrapped = lambda network, *args: network(*args)
    return engine


def watched(config: Config, plan: Plan = SPARSE, step: float = 0.1, steps: int = 1000) -> tuple[Any, dict[str, Any] | None]:
    """A DenseBaseline through the first steps of a plateau, each `step` seconds; its line at the end."""
    engine = engine_of(config)
    watcher = control(config, engine)
    generator = torch.Generator().manual_seed(0)
    at_hand = (torch.randn(4, 3, 32, 32, generator=generator), torch.full((4, 4), 0.25), torch.arange(4))
    reported = None
    for number in range(1, 2 + WARM + WATCHED):
        assert reported is None
        reported = watcher.measure_if_due(
            number / steps, steps, PlanMix.of(plan), StepClock(number, step * number, 0.01 * number), at_hand
        )
    assert watcher.measure_if_due(0.1, steps, PlanMix.of(plan), StepClock(100, 10.0, 1.0), at_hand) is None, "once per plateau"
    return engine, reported


def test_it_times_both_and_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # CPU time: other work on this machine does not count
    monkeypatch.setattr(dense_baseline, "time", SimpleNamespace(perf_counter=time.thread_time))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine, reported = watched(tiny())
    assert reported is not None and reported["pairs"] == dense_baseline.MOST
    # blocks 1 and 2 halve 16 patches: 8, then 4 (prefix apart)
    assert 0.4 < reported["bound_passes"] < 0.7 and reported["own_ms"] > 0 and reported["dense_ms"] > 0
    assert reported["measured_min"] <= reported["measured"] <= reported["measured_max"]
    assert reported["step_ms"] == pytest.approx(100) and reported["data_wait"] == pytest.approx(0.1)
    assert reported["seconds"] < 0.005 * 1000 * 10 * 0.1
    untouched = build_model(tiny()).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in engine.module.state_dict().items())
    assert all(p.grad is None for p in engine.module.parameters())
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    model, kept = build_model(tiny()).train(), torch.get_rng_state()
    dense_baseline.interleaved(
        {"own": lambda: float(model(torch.zeros(1, 3, 32, 32)).logits.detach().sum())}, 2, torch.device("cpu")
    )
    assert torch.equal(kept, torch.get_rng_state()), "dropout drew from the run's generator"


MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "gradient checkpointing": {"checkpointing": True},
    "autocast": {"precision": "autocast"},
    "bf16": {"kind": "deepspeed", "zero": 1, "precision": "bf16"},
    "compile": {"compile": True},
    "all at once": {"checkpointing": True, "precision": "autocast", "compile": True},
}


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow) if "compile" in MODES[m] else m for m in MODES])
def test_in_every_mode_the_training_around_it_is_the_training_without_it(mode: str) -> None:
    """Two networks, the same two micro-batches of a step; one is controlled between them. Gradients, weights and the numbers that
    dropout draws are equal to the bit, in each mode of the engine."""
    settings = {"kind": "ddp", "zero": 0, "precision": "float32"} | MODES[mode]
    config = tiny(engine=settings)
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32

    def bare(network: Any, images: torch.Tensor, *args: Any) -> Any:  # as `Engine.forward_unwrapped`
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "autocast"):
            return network(images.to(dtype), *args)

    def trained(controlled: bool) -> tuple[list[torch.Tensor | None], torch.Tensor, dict[str, Any] | None]:
        torch.compiler.reset()
        model = build_model(config).to(dtype).train()
        if settings.get("compile"):
            model.compile(backend="aot_eager", fullgraph=True)
        objective, reported = build_objective(config), None
        engine = SimpleNamespace(
            module=model,
            on_gpu=False,
            device=torch.device("cpu"),
            batch_split=BatchSplit(4, 2, 8),
            heartbeat=Heartbeat(0, 1, 0.0),
            forward_unwrapped=bare,
            settings=config.engine,
        )
        watcher = control(config, engine)
        generator = torch.Generator().manual_seed(0)
        targets, rng_keys = torch.full((4, 4), 0.25), torch.arange(4)
        torch.manual_seed(1)
        for part in range(2):
            images = torch.randn(4, 3, 32, 32, generator=generator)
            output = bare(model, images, SPARSE, frozenset({"cls_attention"}), rng_keys + 4 * part)
            objective.losses(output.logits, targets).mean().backward()
            if controlled and part == 0:  # 10 s a step: a compiled run may take a minute for its first dense pass
                for number in range(1, 2 + WARM + WATCHED):
                    reported = watcher.measure_if_due(
                        number / 1000,
                        1000,
                        PlanMix.of(SPARSE),
                        StepClock(number, 10.0 * number, 0.0),
                        (images, targets, rng_keys),
                    )
        return [p.grad for p in model.parameters()], torch.get_rng_state(), reported

    grads, drawn_after, reported = trained(controlled=True)
    expected, drawn_without, nothing = trained(controlled=False)
    assert (
        nothing is None and reported is not None and reported["pairs"] >= dense_baseline.FEWEST and reported["dense_ms"] > 0
    ), reported
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert torch.equal(drawn_after, drawn_without)


def test_a_dense_plateau_is_its_own_control() -> None:
    _, reported = watched(tiny(tokens={"method": "all"}), DENSE)
    assert reported is not None and reported["measured"] == reported["bound_passes"] == reported["step_speedup"] == 1.0


@pytest.mark.parametrize(
    ("more", "steps", "words"),
    [
        ({}, 20, ["too short", "control=0.005", "the passes need"]),
        ({"engine": {"zero": 3, "precision": "float32"}}, 1000, ["engine.zero=3"]),
    ],
)
def test_what_is_not_measured_is_reported(more: dict[str, Any], steps: int, words: list[str]) -> None:
    _, reported = watched(tiny(**more), steps=steps)
    assert reported is not None and "measured" not in reported and all(word in reported["note"] for word in words), reported
    assert all(word in dense_baseline.describe(reported) for word in words)


def test_passes_that_take_longer_than_the_runs_own_are_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair is one own pass and one dense: 50 ms of this step (two micro-batches of 100 ms a step) and 50 ms / bound. What all of them
    take stays below `control` of the time of the plateau."""
    asked: list[int] = []

    def counted(passes: dict[str, Any], pairs: int, _device: torch.device) -> dict[str, list[float]]:
        asked.append(pairs)
        return {name: [0.05] * pairs for name in passes}

    monkeypatch.setattr(dense_baseline, "interleaved", counted)
    for steps in (200, 400, 900):
        asked.clear()
        _, reported = watched(tiny(control=0.005), steps=steps)
        assert reported is not None
        allowed = 0.005 * steps * 10 * 0.1  # 10 epochs, one plateau
        bound = reported.get("bound_passes", 0.6)
        pair = 0.05 * (1 + 1 / bound)
        if asked:
            assert (asked[0] + 1) * pair <= allowed * 1.01, (steps, asked)  # one pair to warm up
            assert asked[0] == dense_baseline.MOST or (asked[0] + 2) * pair > allowed * 0.99
        else:
            assert (dense_baseline.FEWEST + 1) * pair > allowed * 0.99, steps
    assert asked


def test_what_earlier_plateaus_took_is_subtracted_from_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """`control` is a share of the whole run, not of each plateau: 5 s here, of which the first plateau takes 4 and the second .9."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    took, pairs = [4.0, 0.9], []

    def counted(passes: dict[str, Any], count: int, _device: torch.device) -> dict[str, list[float]]:
        pairs.append(count)
        clock.now += took[len(pairs) - 1]
        return {name: [0.05] * count for name in passes}

    monkeypatch.setattr(dense_baseline, "time", clock)
    monkeypatch.setattr(dense_baseline, "interleaved", counted)
    config = tiny(control=0.005)
    watcher, reported = control(config, engine_of(config)), []
    at_hand = (torch.zeros(4, 3, 32, 32), torch.full((4, 4), 0.25), torch.arange(4))
    for number in range(1, 1 + 3 * (1 + WARM + WATCHED)):  # three plateaus of 1,000 s in all
        plan = Plan(0.5 + 0.1 * ((number - 1) // (1 + WARM + WATCHED)), 1.0)
        if line := watcher.measure_if_due(number / 1000, 1000, PlanMix.of(plan), StepClock(number, 0.1 * number, 0.0), at_hand):
            reported.append(line)
    assert [line.get("seconds") for line in reported] == pytest.approx([4.0, 0.9, 0.0])
    one = 0.05 * (1 + 1 / reported[1]["bound_passes"])
    assert pairs == [dense_baseline.MOST, int((0.005 * 1000 - 4.0) / one) - 1]
    assert "control=0.005 of the training time allows 0.1 s" in reported[2]["note"]


def test_a_dense_pass_that_does_not_fit_ends_the_control_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(dense_baseline, "interleaved", full)
    _, reported = watched(tiny())
    assert reported is not None and "out of device memory" in reported["note"]


def test_a_plan_that_changes_too_often_is_reported_once() -> None:
    watcher = control(tiny(), SimpleNamespace())
    reported = [
        watcher.measure_if_due(0.0, 9, PlanMix.of(Plan(1 - n / 20, 1.0)), StepClock(n, float(n), 0.0), None) for n in range(9)
    ]  # type: ignore[arg-type]
    assert (
        sum(line is not None for line in reported) == 1
        and reported[1] is not None
        and "changed after 1 steps" in reported[1]["note"]
    )


def test_a_run_that_ends_before_it_can_be_timed_reports_that() -> None:
    """Not for a dense stretch, which is its own baseline, and not with control=0."""

    def reported(plan: Plan, **more: Any) -> list[dict[str, Any]]:
        watcher = control(tiny(**more), SimpleNamespace())
        given: Any = (None, None, None)
        looks = [
            watcher.measure_if_due(n / 17, 17, PlanMix.of(plan), StepClock(n, float(n), 0.0), given, ending=n == 17)
            for n in range(1, 18)
        ]
        assert looks[:-1] == [None] * 16
        return [look for look in looks if look]

    (line,) = reported(SPARSE)
    assert dense_baseline.describe(line).endswith(
        "0.5, connections 1: not measured: training ended after 17 steps under this plan; at least 26 are needed"
    )
    assert reported(DENSE) == reported(SPARSE, control=0.0) == []


def test_the_authors_attention_is_compared_with_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all is kept, and compiled where the run is: one control network for the whole run."""
    made: list[Any] = []
    monkeypatch.setattr(SparseViT, "compile", lambda self: made.append(self))
    passed: list[Any] = []
    one = DenseBaseline._pass
    monkeypatch.setattr(
        DenseBaseline, "_pass", lambda self, network, *args: passed.append(network) or one(self, network, *args)
    )
    settings = {"kind": "ddp", "zero": 0, "precision": "float32", "compile": True}
    engine, reported = watched(tiny(compat="authors", engine=settings), DENSE, step=10.0)
    assert reported is not None and reported["measured"] != 1.0 and reported["bound_passes"] == 1.0
    (dense,) = made
    assert dense.attend is attention.fused and dense.vit is engine.module.vit
    assert set(map(id, passed)) == {id(engine.module), id(dense)}
    plan = {"keep_tokens": 1.0, "keep_connections": 1.0}
    lines: list[dict[str, Any]] = [{"kind": "start", "multiply_adds": 1}, {"kind": "step", **plan, "seconds": 2.0, "images": 9}]
    assert savings([*lines, {"kind": "control", **plan, "step_speedup": 0.8}]).speedup == pytest.approx(0.8)


def test_overheads_are_named() -> None:
    def message(own: float, dense: float, step: float, wait: float = 0.0) -> dict[str, Any]:
        return dense_baseline.journal_fields(
            PlanMix.of(SPARSE), 0.5, {"own": [own] * 3, "dense": [dense] * 3}, step, wait, accumulation=2
        )

    fine = message(0.5, 1.0, 1.05)
    assert fine["note"] == "no significant overhead" and fine["step_speedup"] == pytest.approx(2.05 / 1.05)
    assert "kernel launches" in message(0.8, 1.0, 1.7)["note"]
    assert "engine: 50%" in message(0.5, 1.0, 2.0)["note"]
    waiting = message(0.5, 1.0, 2.5, wait=1.5)
    assert "loader: a step waits for data for 60% of its time" in waiting["note"]
    assert waiting["step_speedup"] == 1.0, "a dense step would only have waited less"
    assert message(1.2, 1.0, 2.5)["step_speedup"] == pytest.approx(2.1 / 2.5), "slower than dense is recorded as slower"


def test_the_whole_run_is_weighted_by_time_and_by_the_examples_left_out(tmp_path: Path) -> None:
    journal = list(made_up())  # 8 s dense on all examples, then 4 s at half of everything on half of the examples
    without = savings(journal)
    assert (without.speedup, without.timed) == (pytest.approx(1.0), pytest.approx(8 / 12)), "what was not timed is not claimed"
    line = {"kind": "control", "attempt": 0, "time": journal[-2]["time"], "step": 25, "step_speedup": 1.5, "measured": 0.6}
    line |= {"keep_tokens": 0.5, "keep_connections": 0.5, "bound_passes": 0.5, "note": "no significant overhead"}
    found = savings_of(write(tmp_path / "tri", [*journal[:-1], line, journal[-1]]))
    assert found.speedup == pytest.approx((8 + 4 * 2 * 1.5) / 12) and found.timed == 1.0
    assert found.bound == pytest.approx((800 + 400 * 2) / (800 + 400 * 0.5))  # images at full cost / images at their cost
    row = next(row for row in summary(tmp_path / "tri").rows if row.what == "speedup, certified")
    assert row.value == f"{found.speedup:.3f}x" and "bound 1.600x" in row.note


JOB = """
name: job
epochs: 3
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, drop_path: 0.1,
        args: {patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3, proj_drop_rate: 0.1}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 32, micro_batch: 8, workers: 0, lanes: 4}
augment: {crop: shift, shift: 2, flip: 0.0, mixup: 0.2, cutmix: 1.0, erasing: 0.25}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9}
tokens: {method: topk, keep: 0.7, blocks: [1, 2]}
connections: {method: shared_keys, keep: 0.5}
engine: {precision: float32}
evaluate: {every: 0ep}
tracking: {to: journal}
stop_at: 30step
"""


@pytest.mark.dist
@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_its_control_is_the_run_without_bit_for_bit(zero: int, digits: Path, tmp_path: Path) -> None:
    """DeepSpeed on two processes, ZeRO 1 and 2, whose hooks sit on the parameters; drop path, dropout and mixing on."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("DIGITS", str(digits)))
    runs = [(f"zero-{zero}-{share}", f"engine.zero={zero} control={share}") for share in (0.0, 0.9)]
    words = [
        str(ROOT / "tests" / "support" / "jobs" / "runs.py"),
        str(path),
        *(f"name={name} {settings}" for name, settings in runs),
    ]
    launch = [sys.executable, *torchrun(2)]
    done = subprocess.run([*launch, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [tmp_path / "runs" / name for name, _ in runs]
    numbers = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines(run, "step")] for run in found]
    reported = [lines(run, "control") for run in found]
    assert [len(one) for one in reported] == [0, 1] and len(numbers[0]) == 30
    assert all(line["step"] < 30 and line["run_speedup"] > 0 for line in reported[1])
    assert numbers[0] == numbers[1]
