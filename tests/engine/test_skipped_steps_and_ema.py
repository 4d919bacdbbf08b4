"""Steps that can't be taken and averages under every ZeRO stage: real DeepSpeed and DDP, two ranks over gloo, many engines per start."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT, environment, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(660)]  # one start for all, and machines may be busy
ALL = [f"deepspeed:{zero}:float32:2" for zero in range(4)] + ["ddp:0:float32:2", "ddp:0:float32:2:device"]
AVERAGED = ["deepspeed:3:float32:2", "deepspeed:1:float32:2"]
SUMMED = [f"ddp:0:autocast:3{more}" for more in ("", ":device")] + [f"deepspeed:{zero}:autocast:3" for zero in range(4)]
SUMMED += ["deepspeed:0:autocast:3:device"]
# numbers that a step reads: whether the gradient is finite and the clipping where the host decides; of DeepSpeed's ZeRO its own
READS = {"ddp:0": 7, "deepspeed:0": 7, "deepspeed:1": 5, "deepspeed:2": 5, "deepspeed:3": 3}
COMPILED = [f"deepspeed:{zero}:float32:1" for zero in (1, 0, 2)]
OTHERS = [
    "accumulating=deepspeed:1:float32:3",
    "accumulating=deepspeed:3:float32:3",
    "fusing=deepspeed:1:float32:1",
    "fusing=ddp:0:float32:1",
]
MORE = ["deepspeed:1:autocast:1", "deepspeed:2:bf16:2", "deepspeed:3:bf16:1", "deepspeed:3:autocast:2", "ddp:0:autocast:1"]
MORE += ["deepspeed:0:float32:2:device", "ddp:0:autocast:1:device"]


def engines(*words: str) -> dict[str, dict[str, Any]]:
    words = (str(ROOT / "tests" / "support" / "jobs" / "many_engines.py"), *words)
    done = subprocess.run(
        [sys.executable, *torchrun(2), *words], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {line["name"]: line for line in (json.loads(text) for text in done.stdout.splitlines() if text.startswith("{"))}


def held_still(found: dict[str, Any]) -> None:
    assert found["taken"] == [True, False, False, False, True, True] and found["clean"]
    assert found["held"] == [[], [], []], "weights, moments, counts and averages after a skipped step: as before it"
    assert found["after"] == [[], []], "and later those of a run without these steps"
    assert found["resumed"] == [] and found["finite"] and found["names"] > 20
    assert not math.isfinite(found["norm"])


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """One start for all: processes cost more than steps."""
    return engines(
        *(f"skipping={mode}" for mode in ALL),
        *(f"averaging={mode}" for mode in AVERAGED),
        *(f"summing={mode}" for mode in SUMMED),
        *OTHERS,
    )


@pytest.mark.parametrize("mode", ALL)
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any(mode: str, found: dict[str, dict[str, Any]]) -> None:
    """A loss of NaN, an infinite loss whose gradient is finite, and a finite loss whose gradient is not."""
    held_still(found[f"skipping={mode}"])


@pytest.mark.slow
def test_it_moves_nothing_in_other_precisions_either() -> None:
    for one in engines(*(f"skipping={mode}" for mode in MORE)).values():
        held_still(one)


def test_the_average_under_zero_3_is_that_of_zero_1(found: dict[str, dict[str, Any]]) -> None:
    """Pieces are averaged; checkpoint, evaluation and resume see them whole."""
    cut, whole = (found[f"averaging={mode}"] for mode in AVERAGED)
    assert cut["average"].keys() == whole["average"].keys() != set()
    for name, values in cut["average"].items():
        assert values == pytest.approx(whole["average"][name], rel=1e-5, abs=1e-6), name
    assert cut["answer"] == pytest.approx(whole["answer"], rel=1e-4, abs=1e-5)
    assert cut["last"] == pytest.approx(whole["last"], rel=1e-5)
    for one in (cut, whole):
        assert one["same_everywhere"] and one["given_back"] == [] and one["resumed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_the_average_under_zero_3_in_other_precisions(precision: str) -> None:
    cut, whole = engines(*(f"averaging=deepspeed:{zero}:{precision}:1" for zero in (3, 1))).values()
    for name, values in cut["average"].items():
        assert values == pytest.approx(whole["average"][name], rel=0.05, abs=0.02), name
    for one in (cut, whole):
        assert one["same_everywhere"] and one["given_back"] == [] and one["resumed"] == []


@pytest.mark.slow
def test_compiled_under_zero_each_plan_is_one_graph_and_none_comes_twice() -> None:
    """Six steps of three plans that come and go, on two ranks; in one process tests/sparsity/test_compile.py looks every time."""
    for one in engines(*(f"compiling={mode}" for mode in COMPILED)).values():
        assert one["graphs"] == [[1, 2, 3, 3, 3, 3]] * 2
        assert one["compiled"] == pytest.approx(one["eager"], rel=1e-5)


@pytest.mark.parametrize("zero", [1, 3])
def test_accumulation_checkpointing_and_clipping_together_are_one_batch(zero: int, found: dict[str, dict[str, Any]]) -> None:
    """Drop path and dropped tokens included."""
    one = found[f"accumulating=deepspeed:{zero}:float32:3"]
    for split, whole in zip(one["split"], one["whole"], strict=True):
        assert split == pytest.approx(whole, rel=2e-5) and whole[1] > 0.1, "clipping has something to do"


@pytest.mark.parametrize("mode", SUMMED)
def test_gradients_of_autocast_are_summed_and_sent_in_float32_and_no_step_synchronises(
    mode: str, found: dict[str, dict[str, Any]]
) -> None:
    """Three micro-batches on two ranks, clipped. Sums in bf16 would be off by the rounding to bf16 at least."""
    one = found[f"summing={mode}"]
    assert one["worst"] < 1e-6 and one["rounded"] > 1e-3
    assert one["synchronised"] == 0
    most = 0 if mode.endswith("device") else READS[mode[: mode.index(":autocast")]]
    assert one["reads"] <= most


@pytest.mark.parametrize("mode", ["deepspeed:1", "ddp:0"])
def test_the_fused_optimizer_gives_the_same_numbers_and_continues_from_the_others_state(
    mode: str, found: dict[str, dict[str, Any]]
) -> None:
    one = found[f"fusing={mode}:float32:1"]
    assert one["names"][0] == one["names"][1] and set(one["fused"]) == {True}
    assert one["furthest"] < 1e-5
