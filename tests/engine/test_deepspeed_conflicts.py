"""A user's own words to DeepSpeed: what conflicts is refused with both values, what does not reaches the live engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, environment, lines, torchrun
from tests.laws.test_main_job import RECIPE
from trainer.config import run_config
from trainer.config.errors import ConfigError
from trainer.data.order import BatchSplit
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.deepspeed_conflicts import merged

ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
STEPS = BatchSplit(8, 3, 24)
TUNED: dict[str, Any] = {
    "train_batch_size": "auto",
    "gradient_accumulation_steps": 3,
    "wall_clock_breakdown": True,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 12345,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu"},
    },
    "optimizer": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale": 0},
}


def render(content: dict[str, Any], folder: Path, env: dict[str, str] | None = None, **settings: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    engine = run_config.EngineConfig(**({"deepspeed": str(path), "zero": 2} | settings))
    ours = deepspeed_config(run_config.EngineConfig(zero=engine.zero, precision=engine.precision), STEPS, world=4, clip=0.5)
    return merged(ours, engine, env or {})


def test_what_does_not_conflict_is_merged_in(tmp_path: Path) -> None:
    reported = render(TUNED, tmp_path)
    assert (
        reported["train_batch_size"] == 96 and reported["wall_clock_breakdown"] is True and reported["gradient_clipping"] == 0.5
    )
    zero = reported["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 12345, False)
    assert zero["offload_optimizer"] == {"device": "cpu"} and "optimizer" not in reported and "fp16" not in reported


CONFLICTS = [
    ({"train_batch_size": 128}, r"data\.batch=96 but .*ds\.json has train_batch_size=128"),
    ({"train_micro_batch_size_per_gpu": 4}, r"data\.micro_batch=8 but .*ds\.json has train_micro_batch_size_per_gpu=4"),
    ({"gradient_accumulation_steps": 1}, r"accumulation=3 but .*ds\.json has gradient_accumulation_steps=1"),
    ({"zero_optimization": None}, r"ds\.json has zero_optimization=null: its keys are set by the configuration"),
    ({"torch_autocast": False}, r"ds\.json has torch_autocast=false: its keys"),
    (
        {"zero_optimization": {"compute_grad_norm": False}},
        r"compute_grad_norm=false: the norm is needed to detect non-finite steps",
    ),
    ({"communication_data_type": "bf16"}, r'communication_data_type="?bf16"?: the precision of gradient sums'),
    ({"gradient_clipping": 1.0}, r"optim\.clip=0\.5 but .*ds\.json has gradient_clipping=1\.0"),
    ({"zero_optimization": {"stage": 3}}, r"engine\.zero=2 but .*ds\.json has zero_optimization\.stage=3"),
    ({"bf16": {"enabled": True}}, r"engine\.precision=autocast but .*ds\.json has bf16\.enabled=true"),
    ({"fp16": {"enabled": True}}, r"ds\.json has fp16\.enabled=true: valid values of engine\.precision"),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": 1}}},
        r"ds\.json has optimizer\.type=Adam: the optimizer is built from optim",
    ),
    (
        {"scheduler": {"type": "WarmupLR"}},
        r"ds\.json has scheduler\.type=WarmupLR: the learning rate is a function of progress",
    ),
    ({"bf16": {"check_grad_overflow": False}}, r"bf16\.check_grad_overflow=false: non-finite steps are skipped"),
]


@pytest.mark.parametrize(("content", "message"), CONFLICTS)
def test_a_conflict_names_both_values(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        render(content, tmp_path)


def test_an_empty_section_takes_nothing_away(tmp_path: Path) -> None:
    reported = render({"zero_optimization": {}, "torch_autocast": {}}, tmp_path)
    assert reported["zero_optimization"]["stage"] == 2 and reported["torch_autocast"]["enabled"] is True


def test_every_conflict_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch=96.*engine\.zero=2"):
        render({"train_batch_size": 1, "zero_optimization": {"stage": 0}}, tmp_path)


ENVIRONMENT = [
    (
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        r"engine\.zero=2 but accelerate \(ACCELERATE_DEEPSPEED_ZERO_STAGE\) has .*stage=3",
    ),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, r"accumulation=3 but accelerate .*gradient_accumulation_steps=1"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"optim\.clip=0\.5 but accelerate .*gradient_clipping=1\.0"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"engine\.precision=autocast but accelerate has mixed_precision=fp16"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"engine\.compile=false but accelerate has dynamo_backend=INDUCTOR"),
    ({"ACCELERATE_USE_FSDP": "true"}, r"accelerate has ACCELERATE_USE_FSDP=true"),
]


@pytest.mark.parametrize(("env", "message"), ENVIRONMENT)
def test_a_conflict_with_accelerates_file_names_both_values(env: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        render({}, tmp_path, {"ACCELERATE_USE_DEEPSPEED": "true"} | env)


def test_settings_of_accelerates_file_are_merged_and_its_files_must_agree(tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    env |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert render({}, tmp_path, env)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(tmp_path / "theirs.json")
    (tmp_path / "theirs.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}}))
    assert render({}, tmp_path, env)["zero_optimization"]["reduce_bucket_size"] == 7
    with pytest.raises(
        ConfigError, match=r"has zero_optimization\.reduce_bucket_size=7 but .*ds\.json has 12345|12345 but .*has 7"
    ):
        render(TUNED | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 12345}}, tmp_path, env)


def test_ddp_refuses_a_file_for_deepspeed_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kind=ddp but engine\.deepspeed="):
        render({}, tmp_path, kind="ddp")
    with pytest.raises(ConfigError, match=r"engine\.deepspeed=nowhere\.json: No such file"):
        render({}, tmp_path, deepspeed="nowhere.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json: not valid JSON"):
        render({}, tmp_path, deepspeed=str(tmp_path / "bad.json"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_its_files_as_they_are_meant(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    read = load_config_from_file(str(path))
    nodes = 2 if "two_nodes" in path.name else 1
    assert (read.num_machines, read.num_processes) == (nodes, 8 * nodes)
    words = ["--config_file", str(path), "-m", "trainer", "train", "c.yaml"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert found.use_deepspeed and found.num_processes == 8 * nodes and found.zero_stage is None
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"accelerate launch --config_file configs/accelerate/{path.name}" in " ".join(head)


@pytest.mark.dist
@pytest.mark.slow
def test_accelerate_launches_with_its_file_and_deepspeed_gets_its_settings(digits: Path, tmp_path: Path) -> None:
    """The file for one node, with two CPU processes in the place of eight GPUs."""
    file = yaml.safe_load((ROOT / "configs" / "accelerate" / "one_node_8_gpus.yaml").read_text())
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 54321}, "wall_clock_breakdown": False})
    )
    file |= {"num_processes": 2, "main_process_port": 0}
    file["deepspeed_config"] |= {"zero_stage": 1, "gradient_clipping": 1.0}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(file))
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    words = [
        str(ROOT / "tests" / "support" / "jobs" / "live_deepspeed_config.py"),
        str(tmp_path / "reported.json"),
        "train",
        "job.yaml",
        "stop_at=2step",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "two.yaml", *words, "engine.deepspeed=ds.json"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    reported = json.loads((tmp_path / "reported.json").read_text())
    assert reported["kind"] == "DeepSpeedEngine" and reported["reduce_bucket_size"] == 54321 and reported["stage"] == 1
    assert reported["config"]["train_batch_size"] == 128 and reported["config"]["gradient_clipping"] == 1.0
    assert [line["world"] for line in lines(tmp_path / "runs" / "job", "start")] == [2]


@pytest.mark.dist
@pytest.mark.slow
def test_a_file_may_change_how_zero_3_holds_its_parameters(tmp_path: Path) -> None:
    """No parameter stays gathered between steps: averages, checkpoints and skipped steps are the same."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    words = [
        str(ROOT / "tests" / "support" / "jobs" / "many_engines.py"),
        "averaging=deepspeed:3:float32:2",
        "skipping=deepspeed:3:float32:2",
    ]
    env = environment(DEEPSPEED_FILE=str(tmp_path / "ds.json"))
    done = subprocess.run([sys.executable, *torchrun(2), *words], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    average, skip = (json.loads(text) for text in done.stdout.splitlines() if text.startswith("{"))
    assert average["same_everywhere"] and average["given_back"] == average["resumed"] == []
    assert skip["held"] == [[], [], []] and skip["resumed"] == []
