"""`make gpu` in its tiny form on the CPU; on a GPU host the same code measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsity import keyed_random
from trainer.bench.gpu import __main__ as gpu
from trainer.bench.gpu import facts, kernels, study
from trainer.bench.gpu.report import Host, run

CPU = torch.device("cpu")


def test_every_device_path_agrees_with_itself_on_the_cpu(capsys: Any, tmp_path: Path) -> None:
    assert gpu.main(["check", "--out", str(tmp_path)]) == 0
    message = capsys.readouterr().out
    assert message.count("ok  ") >= 18 and "FAIL" not in message
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert len(rows) == message.count("ok  ") and all(row["part"] == "check" and row["tiny"] for row in rows)


def test_a_path_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    true, calls = keyed_random.uniform, []

    def drifting(keys: torch.Tensor, *salts: int, **shape: Any) -> torch.Tensor:
        calls.append(keys)
        return true(keys, *salts, **shape) * 0.9 ** len(calls)

    monkeypatch.setattr(keyed_random, "uniform", drifting)
    assert gpu.main(["check"]) == 1
    assert "FAIL  check   keyed uniform draws" in capsys.readouterr().out


def test_a_row_that_fails_is_a_line_and_the_next_one_follows(tmp_path: Path) -> None:
    def raising() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def part(host: Host) -> Any:
        yield "first", raising
        yield "second", lambda: {"ms": 1.23456}
        raise ValueError("no such network")

    shown: list[str] = []
    assert (
        run(
            {"step": part, "next": lambda host: iter([("third", lambda: {"ok": True})])},
            Host(CPU, True, tmp_path),
            shown.append,
        )
        == 2
    )
    assert [line[:6].strip() for line in shown] == ["FAIL", "", "FAIL", "ok"]
    assert "OutOfMemoryError: CUDA out of memory" in shown[0] and "second" in shown[1] and "ms 1.235" in shown[1]
    assert "(part)" in shown[2] and "no such network" in shown[2]
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert "Traceback" in rows[0]["trace"] and rows[1]["ms"] == 1.23456


def test_parts_are_named_and_unknown_ones_refused(capsys: Any) -> None:
    assert list(gpu.parts()) == ["facts", "check", "run", "step", "loop", "engine", "profile", "input", "sparse", "study"]
    with pytest.raises(SystemExit):
        gpu.main(["steps"])
    assert "PART=steps: unknown value; valid values: facts, check, run" in capsys.readouterr().err


def test_steps_and_profile_in_their_tiny_form(capsys: Any, tmp_path: Path) -> None:
    assert gpu.main(["step", "profile", "--out", str(tmp_path)]) == 0
    rows = {(row["part"], row["row"]): row for row in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    assert rows["step", "dense"]["images_per_second"] > 0 and rows["step", "tokens 0.7"]["of_dense"] > 0
    assert rows["step", "dense"]["bound_of_dense"] == 1 > rows["step", "tokens 0.7"]["bound_of_dense"]
    assert rows["step", "dense"]["mfu_of_measured"] > 0
    assert rows["step", "timm"]["attention"] == "torch" and rows["step", "dense"]["attention"] in ("flash", "math")
    assert rows["profile", "dense"]["ms"] > 0 and len(rows["profile", "dense"]["largest"]) == kernels.LARGEST


def test_a_profile_sums_classes_and_idle_time() -> None:
    spans = [
        ("ampere_gemm", 0, 4_000_000),
        ("triton_poi_fused_add", 5_000_000, 7_000_000),
        ("ampere_gemm", 6_000_000, 10_000_000),
    ]
    found = kernels.summary(spans, steps=2)
    assert (found["ms"], found["launches"], found["product_ms"], found["elementwise_ms"]) == (5, 1.5, 4, 1)
    assert found["idle"] == pytest.approx(0.1) and found["largest"][0] == ["ampere_gemm", 4.0, 1.0]
    names = (
        "triton_per_fused_layer_norm",
        "void at::native::sort",
        "pytorch_flash::flash_fwd",
        "ncclDevKernel_AllReduce",
        "xyz",
    )
    assert [kernels.class_of(name) for name in names] == [
        "reduction and norm", "sort and gather", "attention", "communication", "other",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_facts_run_engine_and_input_in_their_tiny_form(capsys: Any) -> None:
    assert gpu.main(["facts", "run", "engine", "input"]) == 0, capsys.readouterr().out
    message = capsys.readouterr().out
    assert "attention, math" in message and "same_batches true" in message and "ours" in message


@pytest.mark.gpu
def test_every_device_path_agrees_with_the_cpu() -> None:
    assert gpu.main(["check"]) == 0 and facts.LENGTHS


def test_a_sitting_asks_the_launcher_to_stop_and_counts_what_is_finished(tmp_path: Path) -> None:
    kept = tmp_path / "tiny" / "dense-seed0.jsonl.xz"
    kept.parent.mkdir()
    stopping = (
        "import signal, sys, time, pathlib\n"
        f"def stop(*_): pathlib.Path({str(kept)!r}).touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(60)"
    )
    found = study.sitting([sys.executable, "-c", stopping], tmp_path, 3.0)
    assert found == {"finished_runs": 1, "all": False, "ok": True}
    done = study.sitting([sys.executable, "-c", "pass"], tmp_path, 60.0)
    assert done == {"finished_runs": 1, "all": True, "ok": True}
    failed = study.sitting([sys.executable, "-c", "raise SystemExit('no shards')"], tmp_path, 60.0)
    assert not failed["ok"] and failed["error"] == "exit code 1" and "no shards" in failed["trace"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_study_runs_whole_and_the_next_sitting_adds_nothing(capsys: Any, tmp_path: Path) -> None:
    """`make gpu PART=study OUT=...` on digits: both arms are trained and in the table, and the second call finds them finished."""
    for _ in range(2):
        assert gpu.main(["study", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["pack digits", *2 * ["sitting", "dense", "random_epoch"]]
    sittings = [row for row in rows if row["row"] == "sitting"]
    assert all(row["finished_runs"] == 2 and row["all"] and row["ok"] for row in sittings)
    assert sittings[1]["seconds"] < sittings[0]["seconds"], "nothing is trained again"
    dense, fewer = (next(row for row in rows if row["row"] == name) for name in ("dense", "random_epoch"))
    assert dense["seeds"] == fewer["seeds"] == 1 and dense["multiply_adds"] == 1.0
    assert fewer["multiply_adds"] == pytest.approx(17 / 22)  # whole batches of .8 x 1,438 images
