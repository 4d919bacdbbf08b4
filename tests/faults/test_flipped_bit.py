"""One flipped bit of a weight on one rank ends the run at the next checkpoint, before that is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT, environment, lines, torchrun
from tests.laws.test_main_job import RECIPE
from trainer.engine.replicas import describe, digest, digests
from trainer.model.ema import Ema


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ddp", pytest.param("deepspeed", marks=pytest.mark.slow)])  # the second: ZeRO 1
def test_a_flipped_bit_on_one_rank_ends_the_run_before_its_checkpoint(kind: str, digits: Path, tmp_path: Path) -> None:
    """The run used to finish with exit code 0, each rank with weights of its own."""
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    script = str(ROOT / "tests" / "support" / "jobs" / "flipped_bit.py")
    settings = [f"engine.kind={kind}", "checkpoint.every=4step", "evaluate.every=0ep", "stop_at=9step", "control=0"]
    command = [sys.executable, *torchrun(2), script, "train", str(tmp_path / "job.yaml"), *settings]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    run = tmp_path / "runs" / "job"
    # DDP keeps the bit; under ZeRO 1 each step copies the weights of the partitions to all ranks, but the average keeps it
    (end,) = lines(run, "end")
    assert "EngineError: replicas differ at step 8: rank 0 and rank 1 have different weights" in end["reason"], done.stderr[
        -3000:
    ]
    assert "continue with --resume from the last checkpoint" in end["reason"]
    assert ("first average of blocks" in end["reason"]) == (kind == "deepspeed")
    assert [line["step"] for line in lines(run, "checkpoint")] == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_every_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(digest(digests({"a": values, "b": values.T})))
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    found = {whole}
    for bit in range(8 * values.element_size()):
        flipped = values.clone()
        mask = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(kind)
        flipped.view(kind)[2, 1] ^= mask
        found.add(int(digest(digests({"a": flipped, "b": values.T}))))
    assert len(found) == 1 + 8 * values.element_size()
    assert int(digest(digests({"a": values, "b": values.T.clone()}))) == whole, "strides do not count"


def test_exchanged_tensors_have_another_digest() -> None:
    a, b = torch.zeros(4), torch.ones(4)
    assert int(digest(digests({"a": a, "b": b}))) != int(digest(digests({"a": b, "b": a})))


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_the_rank_that_differs_from_the_majority_is_named_with_its_host() -> None:
    text = describe([5, 5, 7, 5], table([1, 2], [1, 2], [1, 9], [1, 2]), ["a", "b"], ["m", "n", "o", "p"], 12)
    assert text.startswith(
        "replicas differ at step 12: rank 2 of 4 differs from the majority (1 of 2 tensors, first b); a flipped bit"
    )
    assert "device memory of o (nvidia-smi" in text


def test_two_ranks_of_different_weights_are_both_named() -> None:
    text = describe([5, 7], table([1, 2], [0, 2]), ["a", "b"], ["m", "n"], 12)
    assert "rank 0 and rank 1 have different weights (1 of 2 tensors, first a)" in text and "device memory of m, n" in text


def test_parameters_that_zero_3_partitions_are_not_compared() -> None:
    network = nn.Linear(2, 2)
    assert set(Ema(network, 0.9).replicated()) == {"weight", "bias", "average of weight", "average of bias"}
    assert set(Ema(network, None).replicated()) == {"weight", "bias"}
    network.weight.ds_id, network.weight.ds_tensor = 0, torch.zeros(2)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(Ema(network, 0.9).replicated()) == {"bias", "average of bias"}


def test_buffers_of_batch_norms_are_compared() -> None:
    """Not those of norms whose statistics follow each rank's own images."""
    own = nn.InstanceNorm2d(2, track_running_stats=True)
    assert not Ema(nn.Sequential(own), None).replicated()
    network = nn.BatchNorm2d(2)
    assert "0.running_var" in Ema(nn.Sequential(network, own), None).replicated()
    found = Ema(network, None).replicated()
    assert set(found) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    before = int(digest(digests(found)))
    network.running_var.view(torch.int32)[1] ^= 1 << 20  # pyright: ignore[reportOptionalMemberAccess]
    assert int(digest(digests(Ema(network, None).replicated()))) != before
