"""The training loop against a record of its own: one small run in this process, watched at every step, beside a plain torch loop in
this file. Learning rate, mixup, keep ratio, average, clipping, skipped steps and log windows are written out here once more; batches,
network and level 1 are the trainer's, which tests of their own cover. Laws 1, 2 and 4 of docs/laws.md."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import Tensor

from sparsity.attention_kernel import TORCHS_CHOICE, AttentionShape, Kernels
from sparsity.types import Plan, single_process
from tests.conftest import lines
from tests.support import images as drawn
from trainer import train as loop
from trainer.config.run_config import Config
from trainer.data.augment.mixup import Mix
from trainer.data.augment.on_device import augment_on_device, normalise
from trainer.data.keyed_hash import hashed
from trainer.data.loader.build import training_stream, validation_set
from trainer.data.loader.dataset import open_indexes
from trainer.data.shards.index import build_index
from trainer.engine.engine import Engine
from trainer.engine.environment import reset_accelerate
from trainer.engine.processes import Processes
from trainer.model import build
from trainer.model.build import build_examples, build_model
from trainer.model.ema import Ema
from trainer.model.objective import Objective
from trainer.provenance.hash_chain import HashChain
from trainer.run import assembly, directory
from trainer.run.recorder import RunResult
from trainer.run.shutdown import SIGNALS

SEED, EPOCHS, SPOILED, MICRO = 5, 3, 7, 8  # SPOILED: this step's second micro-batch loses NaN
LR, WARMUP, WARMUP_LR, MIN_LR, DECAY, CLIP, MIXUP, CHANCE, SMOOTHING = 4e-3, 0.5, 1e-5, 2e-4, 0.8, 0.5, 0.8, 0.7, 0.1
LOGGED, SCORED, STAIR = 2, 4, 1.8


def settings(folder: Path, name: str, **more: Any) -> Config:
    args = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "proj_drop_rate": 0.1}
    return drawn.config(
        str(folder / "train-*.tar"),
        name=name,
        runs=str(folder / "runs"),
        seed=SEED,
        epochs=EPOCHS,
        log_every=f"{LOGGED}step",
        control=0,
        model={
            "name": "deit_tiny_patch16_224",
            "classes": 4,
            "image_size": 32,
            "drop_path": 0.2,
            "args": args,
        },
        data={
            "validation": str(folder / "validation-*.tar"),
            "batch": 16,
            "micro_batch": MICRO,
            "broken_share": 0.1,
        },
        augment={"erasing": 0.25, "mixup": MIXUP, "mix_probability": CHANCE, "smoothing": SMOOTHING},
        optim={"lr": LR, "warmup": f"{WARMUP}ep", "warmup_lr": WARMUP_LR, "min_lr": MIN_LR, "ema": DECAY, "clip": CLIP,
               "layer_decay": 0.7, "eps": 1e-6},
        examples={"method": "infobatch", "removed": 0.5},
        tokens={"method": "topk", "blocks": [1]},
        plan={"method": "staircase", "stairs": [["0ep", 1.0, 1.0], [f"{STAIR}ep", 0.5, 1.0]]},
        engine={"kind": "ddp", "zero": 0, "precision": "float32"},
        evaluate={"every": f"{SCORED}step", "batch": 8},
        checkpoint={"every": "5step", "keep": 9},
        tracking={"to": "journal"},
        **more,
    )  # fmt: skip


class Step(NamedTuple):
    """A step of a run: what it was given and what it left. rates: (rate, scale) of each group."""

    progress: float
    rates: list[tuple[float, float]]
    taken: bool
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    examples: list[int]


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


# -- the run ---------------------------------------------------------------------------------------------------------------


class Watched(Engine):
    """The engine of the run: writes down each step and each forward pass as they come."""

    steps: ClassVar[list[tuple[list[tuple[float, float]], bool, dict[str, Tensor]]]] = []
    averages: ClassVar[list[dict[str, Tensor]]] = []  # as the step finds them
    passes: ClassVar[list[tuple[bool, bool, Plan]]] = []  # with gradients, in training mode, the plan
    average: Ema
    at = 0
    before: ClassVar[list[tuple[Kernels, str]]] = []  # kernels of attention that each attempt was given, and their device

    def choose_attention(
        self, shapes: Iterable[AttentionShape], before: Kernels = TORCHS_CHOICE, on: str = ""
    ) -> tuple[Kernels, dict[str, Any]]:
        """As on a GPU, for a count of tokens that does not occur."""
        self.before.append((before, on))
        return {(3, False): "math"}, super().choose_attention(shapes, before, on)[1]

    def reseed(self, seed: int, step: int) -> None:
        Watched.at = step + 1
        super().reseed(seed, step)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes.append((torch.is_grad_enabled(), self.module.training, args[1]))
        return super().forward(*args, **kwargs)

    def step(self) -> bool | Tensor:
        rates = [(group["lr"], group["lr_scale"]) for group in self.optimizer.param_groups]
        self.averages.append(copied(self.average.state_dict()))
        taken = super().step()
        self.steps.append((rates, bool(taken), copied(self.module.vit.state_dict())))
        return taken


class WatchedEma(Ema):
    def __init__(self, *args: Any):
        super().__init__(*args)
        Watched.average = self


class Spoiled(Objective):
    part = 0

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        Spoiled.part += 1
        return super().losses(logits, targets) * (math.nan if Watched.at == SPOILED and Spoiled.part % 2 == 0 else 1.0)


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """A run in this process leaves signal handlers, variables and accelerate's singletons behind: put back here. Its log file would take
    pytest's handler of crashes."""
    variables, handlers = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate takes all cores
    patch = pytest.MonkeyPatch()
    patch.setattr(directory, "log_to", lambda path: None)
    for module, name, mine in ((assembly, "Engine", Watched), (assembly, "Ema", WatchedEma), (build, "Objective", Spoiled)):
        patch.setattr(module, name, mine)
    yield
    patch.undo()
    reset_accelerate()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(variables)


class Run(NamedTuple):
    result: RunResult
    steps: list[Any]
    averages: list[dict[str, Tensor]]
    passes: list[tuple[bool, bool, Plan]]


def run(config: Config, resume: bool = False) -> Run:
    reset_accelerate()
    Watched.steps, Watched.averages, Watched.passes, Spoiled.part = [], [], [], 0
    result = loop.train(config, resume)
    Watched.averages.append(copied(Watched.average.state_dict()))
    return Run(result, Watched.steps, Watched.averages, Watched.passes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images in 4 shards, one of them broken, and 13 to validate with."""
    folder = tmp_path_factory.mktemp("record")
    build_index(drawn.write_shards(folder, [20, 17, 19, 24], broken=[7]), progress=False)
    build_index(drawn.write_shards(folder, [13], stem="validation", broken=[3]), progress=False)
    return folder


@pytest.fixture(scope="module")
def whole(in_process: None, folder: Path) -> Run:
    return run(settings(folder, "whole"))


# -- the same in plain torch -----------------------------------------------------------------------------------------------


def rate(progress: float) -> float:
    """Linear up to LR, then the cosine of the whole run."""
    if progress < WARMUP:
        return WARMUP_LR + (LR - WARMUP_LR) * progress / WARMUP
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * progress / EPOCHS)) / 2


def keep(progress: float) -> Plan:
    return Plan(0.5 if progress >= STAIR else 1.0, 1.0)


def share(step: int) -> float:
    """Own share of each image in a step (counted from 0): 1 where nothing is mixed."""
    rng = np.random.default_rng([0x6D6978, SEED, step])
    return float(rng.beta(MIXUP, MIXUP)) if rng.random() < CHANCE else 1.0


def mixed(rows: Tensor, weights: Tensor, own: float) -> Tensor:
    """Rows 2i and 2i + 1 mixed; a row beside one of weight 0 stays whole."""
    result = rows.clone()
    for row in range(len(rows)):
        if weights[row ^ 1] > 0:
            result[row] = own * rows[row] + (1 - own) * rows[row ^ 1]
    return result


class Window:
    """Sums between two log lines."""

    def __init__(self) -> None:
        self.loss = self.weight = self.right = self.judged = self.images = 0.0


class Twin:
    """The plain loop: what each step leaves, each log line and each score."""

    def __init__(self, config: Config):
        self.config = config
        self.index, validation = open_indexes(config.data)
        self.stream, self.validation = training_stream(self.index, config, 0, 1), validation_set(validation, config, 0, 1)
        self.model, self.examples = build_model(config), build_examples(config, self.index)
        self.objective = Objective(4, smoothing=SMOOTHING)
        self.optimizer = create_optimizer_v2(
            self.model.vit, "adamw", lr=LR, weight_decay=0.05, layer_decay=0.7, betas=(0.9, 0.999), eps=1e-6
        )
        self.average = copied(self.model.vit.state_dict())
        self.steps: list[Step] = []
        self.logs: list[dict[str, Any]] = []
        self.scores: list[tuple[int, bool, float, float]] = []
        chain, window = HashChain(), Window()
        for epoch in range(EPOCHS):
            selection = self.examples.select(epoch, single_process)
            batches = list(self.stream.epoch(epoch, selection))
            for number, batch in enumerate(batches):
                chain.add(batch.ids, batch.rng_keys, batch.weights)
                norm = self._step(epoch + number / len(batches), batch, window)
                last = epoch == EPOCHS - 1 and number == len(batches) - 1
                done = len(self.steps)
                if done % LOGGED == 0 or done in (SPOILED, 5, 15) or last:
                    self.logs.append({"step": done, "loss": window.loss / window.weight, "images": window.images,
                                      "train_top1": window.right / window.judged, "grad_norm": norm, "progress": self.steps[-1].progress,
                                      "lr": rate(self.steps[-1].progress), "chain": chain.close(Processes()),  # type: ignore[arg-type]
                                      "keep_tokens": keep(self.steps[-1].progress).keep_tokens})  # fmt: skip
                    window = Window()
                if done % SCORED == 0 or last:
                    self._score(done)

    def _step(self, progress: float, batch: Any, window: Window) -> float:
        step, own = len(self.steps), share(len(self.steps))
        torch.manual_seed(int(hashed(SEED, step, 0)) >> 1)
        rates = []
        for group in self.optimizer.param_groups:
            group["lr"] = rate(progress) * group["lr_scale"]
            rates.append((group["lr"], group["lr_scale"]))
        self.model.train()
        self.optimizer.zero_grad()
        for start in range(0, len(batch.labels), MICRO):
            part = batch._replace(**{name: getattr(batch, name)[start : start + MICRO] for name in batch._fields[:-1]})
            images = mixed(augment_on_device(part, self.config.augment), part.weights, own)
            hot = torch.full((len(part.labels), 4), SMOOTHING / 4)
            hot[torch.arange(len(hot)), part.labels.clamp(min=0)] += 1 - SMOOTHING
            targets = mixed(hot, part.weights, own)
            output = self.model(images, keep(progress), frozenset(), part.rng_keys)
            losses = -(targets * output.logits.log_softmax(-1)).sum(-1)
            if step + 1 == SPOILED and start == MICRO:
                losses = losses * math.nan
            ((losses * part.weights).sum() / batch.weights.sum()).backward()
            ids, observation = self.objective.credit(part, output, losses, Mix(own))
            self.examples.observe(ids, observation)
            if not losses.isnan().any():
                window.loss += float((losses.detach() * part.weights).sum())
                window.weight += float(part.weights.sum())
                window.right += float((observation.correct & observation.valid).sum())
                window.judged += float(observation.valid.sum())
        window.images += float((batch.weights > 0).sum())
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
        if taken := math.isfinite(norm):
            for grad in grads:
                grad *= min(1.0, CLIP / norm)
            self.optimizer.step()
            for name, value in self.model.vit.state_dict().items():
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value
        self.steps.append(
            Step(progress, rates, taken, copied(self.model.vit.state_dict()), copied(self.average), batch.ids.tolist())
        )
        return norm

    def _score(self, step: int) -> None:
        """Of the weights and of their average, under the plan of the last step; dropout off."""
        network = copy.deepcopy(self.model).eval()
        for averaged in (False, True):
            if averaged:
                network.vit.load_state_dict(self.average)
            right = loss = images = 0.0
            for batch in self.validation:
                with torch.no_grad():
                    logits = network(normalise(batch.images, self.config.augment), keep(self.steps[-1].progress)).logits
                there = batch.weights > 0
                right += float((logits.argmax(-1) == batch.labels)[there].sum())
                loss -= float(logits.log_softmax(-1)[there, batch.labels[there]].sum())
                images += float(there.sum())
            self.scores.append((step, averaged, right / images, loss / images))


@pytest.fixture(scope="module")
def twin(whole: Run, folder: Path) -> Twin:
    return Twin(settings(folder, "whole"))


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


# -- the two side by side --------------------------------------------------------------------------------------------------


def test_the_record_covers_what_it_should(whole: Run, twin: Twin) -> None:
    """More than one epoch of different length, a step that is not taken, mixed and unmixed steps, weights other than 1."""
    assert whole.result.status == "finished" and len(whole.steps) == len(twin.steps) > 2 * SCORED
    assert [step.taken for step in twin.steps].count(False) == 1 and not twin.steps[SPOILED - 1].taken
    assert SPOILED % LOGGED and SPOILED % 5, "only that it was skipped makes a log line of this step"
    shares = [share(step) for step in range(len(twin.steps))]
    assert 1.0 in shares and len(set(shares)) > 5
    lengths = [line["steps"] for line in lines(whole.result.directory, "epoch")]
    assert sum(lengths) == len(twin.steps) and len(set(lengths)) > 1, "InfoBatch leaves examples out of later epochs"
    assert {keep(step.progress).keep_tokens for step in twin.steps} == {0.5, 1.0}
    borders = [twin.steps[n - 1].progress < STAIR <= twin.steps[n].progress for n in range(SCORED, len(twin.steps), SCORED)]
    assert any(borders), (
        "an evaluation falls between the last step of a plan and the first of the next: it takes the last one's"
    )


def test_the_learning_rate_of_each_step_is_the_formulas(whole: Run, twin: Twin) -> None:
    for (rates, _, _), step in zip(whole.steps, twin.steps, strict=True):
        assert len({scale for _, scale in rates}) > 1, "layer decay"
        assert [lr for lr, _ in rates] == pytest.approx([lr for lr, _ in step.rates], rel=1e-12)
        assert [lr for lr, scale in rates if scale == 1.0] == pytest.approx([rate(step.progress)] * 2, rel=1e-12)


def test_the_weights_of_each_step_are_those_of_a_plain_loop(whole: Run, twin: Twin) -> None:
    """Batches, mixing, dropout, loss weights, clipping, keep ratios: an error in any of them is another gradient."""
    for (_, taken, weights), step in zip(whole.steps, twin.steps, strict=True):
        assert taken == step.taken
        close(weights, step.weights)
    before, spoiled = whole.steps[SPOILED - 2][2], whole.steps[SPOILED - 1][2]
    assert all(torch.equal(value, before[name]) for name, value in spoiled.items())


def test_the_average_follows_taken_steps_only(whole: Run, twin: Twin) -> None:
    for found, step in zip(whole.averages[1:], twin.steps, strict=True):
        close(found, step.average)
    assert all(torch.equal(value, whole.averages[SPOILED - 1][name]) for name, value in whole.averages[SPOILED].items())
    for path in (whole.result.directory / "checkpoints").glob("step-*"):
        number = int(path.name.removeprefix("step-"))
        close(load_file(path / "ema.safetensors"), twin.steps[number - 1].average)
        close(load_file(path / "weights.safetensors"), twin.steps[number - 1].weights)


def test_steps_train_and_evaluations_do_not(whole: Run, twin: Twin) -> None:
    """Also the steps behind an evaluation in mid-epoch; and each pass under the keep ratios of its step."""
    assert {(grads, training) for grads, training, _ in whole.passes} == {(True, True), (False, False)}
    expected: list[Plan] = []
    for number, step in enumerate(twin.steps, 1):
        expected += [keep(step.progress)] * (16 // MICRO)
        if number % SCORED == 0 or number == len(twin.steps):
            expected += [keep(step.progress)] * (2 * 2)  # two batches of 8, the weights and their average
    assert [plan for _, _, plan in whole.passes] == expected


def test_the_log_lines_sum_their_windows(whole: Run, twin: Twin) -> None:
    found = lines(whole.result.directory, "step")
    assert [line["step"] for line in found] == [line["step"] for line in twin.logs]
    for ours, theirs in zip(found, twin.logs, strict=True):
        for name, value in theirs.items():
            if isinstance(value, str):
                assert ours[name] == value, (name, ours["step"])
            elif math.isfinite(value):
                assert ours[name] == pytest.approx(value, rel=1e-4), (name, ours["step"])
    assert found[-1]["images_total"] == sum(line["images"] for line in twin.logs)
    (skipped,) = lines(whole.result.directory, "skipped")
    assert skipped["step"] == SPOILED


def test_the_scores_are_those_of_the_weights_and_of_their_average(whole: Run, twin: Twin) -> None:
    found = lines(whole.result.directory, "eval")
    assert [(line["step"], line["ema"]) for line in found] == [(step, ema) for step, ema, _, _ in twin.scores]
    lengths = [line["steps"] for line in lines(whole.result.directory, "epoch")]
    for line, (step, _, top1, loss) in zip(found, twin.scores, strict=True):
        epoch = next(number for number in range(EPOCHS) if step <= sum(lengths[: number + 1]))
        done = epoch + (step - sum(lengths[:epoch])) / lengths[epoch]
        assert line["progress"] == pytest.approx(done), "of the steps done, not of the last one's begin"
        assert line["loss"] == pytest.approx(loss, rel=1e-4) and line["images"] == 12
        assert line["top1"] == pytest.approx(top1)
    assert whole.result.top1 == found[-1]["top1"]
    # only a state that is saved can be the best: evaluations come every 4 steps, checkpoints every 5, both at the end
    for path in sorted((whole.result.directory / "checkpoints").glob("step-*"))[:-1]:
        assert json.loads((path / "state.json").read_text())["state"]["best_step"] == -1, path.name


def test_a_run_stopped_after_a_skipped_step_resumes_as_if_uninterrupted(whole: Run, folder: Path) -> None:
    first = run(settings(folder, "halves", stop_at=f"{SPOILED}step"))
    assert first.result.status == "stopped" and len(first.steps) == SPOILED
    rest = run(settings(folder, "halves"), resume=True)
    assert rest.result.status == "finished"
    (none, _), (kernels, device) = Watched.before[-2:]
    assert none == {} and kernels == {(3, False): "math"} and "CPU" in device, "the kernels of the first attempt"
    for (_, _, ours), (_, _, theirs) in zip([*first.steps, *rest.steps], whole.steps, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for ours, theirs in zip([*first.averages[:-1], *rest.averages], whole.averages, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    names = ("step", "loss", "lr", "chain", "grad_norm", "images_total", "train_top1")
    ours, theirs = (
        [repr([line[name] for name in names]) for line in lines(one.result.directory, "step")] for one in (rest, whole)
    )
    assert ours == theirs
