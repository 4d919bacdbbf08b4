"""The engine for real: DeepSpeed and DDP over gloo, every ZeRO stage, saved and resumed, on the same and on another world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import ROOT, environment, torchrun
from trainer.config import run_config
from trainer.data.order import BatchSplit
from trainer.engine.deepspeed_config import deepspeed_config, fit_buckets
from trainer.engine.engine import Engine
from trainer.engine.processes import Processes, ddp_settings

pytestmark = pytest.mark.dist


def job(
    world: int, kind: str, zero: int, precision: str, accumulation: int, start: int, stop: int, folder: Path, *more: str
) -> Any:
    words = [
        str(ROOT / "tests" / "support" / "jobs" / "one_engine.py"),
        kind,
        str(zero),
        precision,
        str(accumulation),
        str(start),
        str(stop),
        str(folder),
    ]
    done = subprocess.run(
        [sys.executable, *torchrun(world), *words], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["step"]: (line["loss"], line["norm"]) for line in lines}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plain DDP's way through the same steps, on one process."""
    return job(1, "ddp", 0, "float32", 1, 0, 5, tmp_path_factory.mktemp("control"))


# in `make test`: ZeRO 0, 1 and 2 resumed on other worlds in test_main_job, ZeRO 3 to the bit in test_teacher_job and test_frozen_job
MODES = [
    ("deepspeed", 3, "float32", 1e-6),
    ("deepspeed", 1, "float32", 1e-6),
    ("deepspeed", 1, "autocast", 4e-3),
    ("deepspeed", 0, "float32", 1e-6),
    ("deepspeed", 2, "float32", 1e-6),
    ("deepspeed", 0, "autocast", 4e-3),
    ("deepspeed", 2, "bf16", 1e-2),
    ("ddp", 0, "float32", 1e-6),
    ("ddp", 0, "autocast", 4e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero", "precision", "near"), MODES)
def test_resumed_is_uninterrupted_and_any_world_size_continues(
    kind: str, zero: int, precision: str, near: float, control: Any, tmp_path: Path
) -> None:
    whole = job(2, kind, zero, precision, 1, 0, 5, tmp_path)
    for step, (loss, norm) in whole.items():
        assert (loss, norm) == pytest.approx(control[step], rel=near), step
    again = job(2, kind, zero, precision, 1, 3, 5, tmp_path)
    assert again == {step: whole[step] for step in (3, 4)}, "the same world: bit for bit"
    alone = job(1, kind, zero, precision, 1, 3, 5, tmp_path)
    for step in (3, 4):
        assert alone[step] == pytest.approx(whole[step], rel=near), "another world: to rounding"


@pytest.mark.slow
def test_an_optimizer_that_counts_its_steps_in_its_groups_resumes_too(tmp_path: Path) -> None:
    """timm's LAMB, whose bias correction would start again."""
    whole = job(1, "deepspeed", 0, "float32", 1, 0, 5, tmp_path, "lamb")
    assert job(1, "deepspeed", 0, "float32", 1, 3, 5, tmp_path, "lamb") == {step: whole[step] for step in (3, 4)}


@pytest.mark.slow  # with checkpointing and clipping in test_engine_steps
def test_accumulated_micro_batches_are_one_batch(control: Any, tmp_path: Path) -> None:
    split = job(2, "deepspeed", 1, "float32", 3, 0, 4, tmp_path)
    for step, found in split.items():
        assert found == pytest.approx(control[step], rel=1e-6)


def test_every_rank_believing_to_be_alone_is_refused(tmp_path: Path) -> None:
    """What accelerate makes of WORLD_SIZE=2 where it may not see the ranks: one process each, and checkpoints that collide."""
    text = """
import os
os.environ |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
import accelerate.state
from accelerate import PartialState
from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine.engine import Engine
from trainer.engine.errors import EngineError
import trainer.engine.engine
import accelerate
class Alone(accelerate.Accelerator):
    num_processes = 1
    def __init__(self, *a, **k): pass
accelerate.Accelerator = Alone
try:
    Engine(EngineConfig(kind="ddp"), BatchSplit(2, 1, 2))
except EngineError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", text], env=environment(), capture_output=True, text=True, timeout=120)
    assert "refused: WORLD_SIZE=2, but accelerate counts 1 process(es)" in done.stdout, done.stderr[-2000:]


def test_dropout_is_seeded_by_seed_step_and_rank() -> None:
    def seeded(seed: int, step: int, rank: int) -> int:
        engine = Engine.__new__(Engine)  # no process group
        engine.rank = rank
        engine.reseed(seed, step)
        return torch.initial_seed()

    with torch.random.fork_rng(devices=[]):
        found = [seeded(*where) for where in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1))]
        assert len(set(found)) == 5
        assert seeded(0, 0, 1) == found[1]


def test_every_setting_of_deepspeed_is_given_and_none_is_automatic() -> None:
    reported = deepspeed_config(run_config.EngineConfig(zero=2, precision="bf16"), BatchSplit(8, 3, 24), world=4, clip=0.5)
    assert reported["train_batch_size"] == 96 and reported["gradient_accumulation_steps"] == 3
    assert reported["train_micro_batch_size_per_gpu"] == 8 and reported["gradient_clipping"] == 0.5
    assert (
        reported["zero_optimization"]["stage"] == 2
        and reported["bf16"]["enabled"]
        and not reported["torch_autocast"]["enabled"]
    )
    assert '"auto"' not in json.dumps(reported)


def test_deepspeed_neither_waits_for_the_device_nor_holds_buffers_larger_than_the_model() -> None:
    """Its throughput timer synchronises twice per step; its buffer of gradients has 5e8 numbers by default."""
    settings, split, model = run_config.EngineConfig(zero=2), BatchSplit(8, 3, 24), torch.nn.Linear(10, 7)
    rendered = deepspeed_config(settings, split, world=1, clip=0.0)
    assert rendered["timers"] == {"throughput": {"enabled": False}}
    fit_buckets(rendered, model)
    assert rendered["zero_optimization"]["reduce_bucket_size"] == 77
    rendered["zero_optimization"]["reduce_bucket_size"] = 5  # the user's own
    fit_buckets(rendered, model)
    assert rendered["zero_optimization"]["reduce_bucket_size"] == 5
    replicated = deepspeed_config(settings.model_copy(update={"zero": 0}), split, world=1, clip=0.0)
    fit_buckets(replicated, model)
    assert "reduce_bucket_size" not in replicated["zero_optimization"]


@pytest.mark.parametrize(("autotune", "given"), [(False, {}), (True, {"mode": "max-autotune-no-cudagraphs"})])
def test_autotune_is_torchs_mode(
    autotune: bool, given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[dict[str, str]] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine)
    engine.settings = run_config.EngineConfig(kind="ddp", compile=True, autotune=autotune)
    engine.on_gpu, model = False, torch.nn.Linear(2, 2)
    model.compile = lambda **settings: compiled.append(settings)
    engine.prepare(model, torch.optim.SGD(model.parameters()))
    assert compiled == [given]
    assert engine.compile_cache == str(tmp_path)


@pytest.mark.filterwarnings("error")
def test_ddp_takes_its_settings_without_a_warning_and_broadcasts_no_buffers() -> None:
    if dist.is_initialized():  # of a run in this process, by an earlier test
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(torch.nn.Linear(2, 2), **ddp_settings())
        assert wrapped.gradient_as_bucket_view and not wrapped.broadcast_buffers
    finally:
        dist.destroy_process_group()
