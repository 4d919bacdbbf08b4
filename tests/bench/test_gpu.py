"""`make gpu` in its tiny form on the CPU; on a GPU host the same code measures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sparsity import keyed_random
from tests.conftest import ROOT
from trainer.bench.gpu import __main__ as gpu
from trainer.bench.gpu import compile_rows, counts, facts, kernels, processes, step, study
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


def test_a_part_is_interrupted_after_its_limit_and_the_next_one_runs(tmp_path: Path) -> None:
    """What was not measured is a line with the names; an earlier row stays, and so does another error of the row that was interrupted."""

    def swallowed() -> dict[str, Any]:
        try:
            time.sleep(30)
        except Exception as error:  # as a compiler does with everything that it calls
            raise RuntimeError("backend failed") from error
        return {}

    def part(host: Host) -> Any:
        yield "quick", lambda: {"ms": 1.0}
        yield "slow", swallowed
        yield "after it", lambda: {"ms": 2.0}

    shown: list[str] = []
    started = time.monotonic()
    assert run({"step": part, "next": lambda host: iter([("third", dict)])}, Host(CPU, True, tmp_path), shown.append, 0.5) == 1
    assert time.monotonic() - started < 10
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["quick", "(part)", "third"] and shown[1].startswith("FAIL")
    assert rows[1]["not_measured"] == ["slow", "after it"] and "limit of 0.5 s; LIMIT= raises it" in rows[1]["error"]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_interrupted_part_leaves_no_process(tmp_path: Path) -> None:
    """Neither the command nor what the command started: they would keep the GPU."""
    command = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]]).wait()"
    )
    mark = f"{tmp_path}/mark"

    def part(host: Host) -> Any:
        yield "one", lambda: processes.one([sys.executable, "-c", command, mark], os.environ)

    def several(host: Host) -> Any:
        commands = [[sys.executable, "-c", command, mark]] * 3
        yield "several", lambda: processes.all_of(commands, ["a", "b", "c"], os.environ, 2)

    for one in (part, several):
        assert run({"run": one}, Host(CPU, True, None), lambda line: None, 2.0) == 1
        found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True).stdout.split()
        assert not found


def test_no_process_outlives_a_killed_make_gpu(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import os, sys; from trainer.bench.gpu import processes; processes.shown([sys.executable, '-c', {child!r}], os.environ, 0.0)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        _until(lambda: file.is_file() and file.read_text() != "")
        parent.kill()
    _until(lambda: not _runs(int(file.read_text())))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not done():
        assert time.monotonic() < end, "not within 40 s"
        time.sleep(0.05)


def test_processes_run_a_few_at_a_time_and_the_first_failure_is_kept(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); p.touch(); time.sleep(.4); p.unlink()"
    commands = [[sys.executable, "-c", code, str(tmp_path / name)] for name in "abcd"]
    commands[2] = [sys.executable, "-c", "raise SystemExit('no such row')"]
    found = processes.all_of(commands, list("abcd"), os.environ, 2)
    assert set(found) >= set("abcd") and not found["ok"] and found["error"] == "exit code 1" and "no such row" in found["trace"]
    assert found["a"] + found["b"] + found["d"] > 1.2
    done = processes.one([sys.executable, "-c", "import os; print(os.getcwd()); raise SystemExit(3)"], os.environ, tmp_path)
    assert done["error"] == "exit code 3" and str(tmp_path) in done["trace"]


def test_spans_of_annotations_are_no_kernels() -> None:
    """On a GPU they are on the device too, and span whole passes: time by class would be double, and nothing idle."""
    weight = torch.randn(8, 8)

    def one() -> None:
        with torch.autograd.profiler.record_function("a whole pass"):
            weight @ weight

    found = kernels.profiled(CPU, one, 2)
    assert found["launches"] > 0 and "a whole pass" not in {name for name, *_ in found["largest"]}


def test_on_a_gpu_every_part_has_a_process_that_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    """A context that an error has broken ends with its part; a process that does not end is killed some time after the limit."""
    started: list[tuple[list[str], float]] = []
    codes = iter([1, -9, 0])

    def shown(command: list[str], environment: Any, limit: float) -> int:
        started.append((command[3:], limit))
        return next(codes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "shown", shown)
        assert gpu.main(["facts", "step", "run", "--out", str(tmp_path), "--limit", "10"]) == 1
    assert started == [(["--here", part, "--limit", "10.0", "--out", str(tmp_path)], 40.0) for part in ("facts", "step", "run")]
    assert re.search(r"FAIL  step    \(part\) +error its process ended with -9", capfd.readouterr().out)
    (line,) = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert (line["part"], line["row"], line["ok"]) == ("step", "(part)", False)
    code = "import time; print('begun', flush=True); time.sleep(60)"
    before = time.monotonic()
    assert processes.shown([sys.executable, "-c", code], os.environ, 1.0) == -signal.SIGKILL and time.monotonic() - before < 20
    assert processes.shown([sys.executable, "-c", "print('row'); raise SystemExit(1)"], os.environ, 0.0) == 1
    assert "begun\nrow\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_load_the_graphs_that_other_processes_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a tiny network for the CPU: the second compilation, in this process, takes every graph from the cache."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # it belongs to the code of a graph for the CPU
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as in the part: it belongs to a graph's key
    host = Host(CPU, tiny=False, out=None)
    config = step.configured(host, step.TINY)
    kernels = {(17, False): "flash"}
    requests = [compile_rows.Request(row, step.TINY, compile_rows.packed(kernels)) for row in ("dense", "tokens 0.7")]
    found = compile_rows.compiled(requests, CPU)
    assert found["ok"], found
    for row in ("dense", "tokens 0.7"):
        counters.clear()
        step.step_of(host, config, counts.rows()[row], kernels)
        used = counters["inductor"] + counters["aot_autograd"]
        assert used["fxgraph_cache_miss"] == 0 and used["fxgraph_cache_hit"] + used["autograd_cache_hit"] > 0, used
        torch.compiler.reset()
    torch.set_float32_matmul_precision(precision)


def test_parts_are_named_and_unknown_ones_refused(capsys: Any) -> None:
    assert list(gpu.parts()) == [
        "facts",
        "check",
        "run",
        "resume",
        "step",
        "loop",
        "engine",
        "profile",
        "input",
        "sparse",
        "study",
    ]
    with pytest.raises(SystemExit):
        gpu.main(["steps"])
    assert "PART=steps: unknown value; valid values: facts, check, run" in capsys.readouterr().err


def test_steps_and_profile_in_their_tiny_form(capsys: Any, tmp_path: Path) -> None:
    assert gpu.main(["step", "profile", "--out", str(tmp_path)]) == 0
    rows = {(row["part"], row["row"]): row for row in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    assert rows["step", "attention kernels"]["attention"] in ("flash", "math")
    assert rows["step", "dense"]["images_per_second"] > 0 and rows["step", "tokens 0.7"]["of_dense"] > 0
    assert rows["step", "dense"]["bound_of_dense"] == 1 > rows["step", "tokens 0.7"]["bound_of_dense"]
    assert rows["step", "dense"]["mfu_of_measured"] > 0
    assert rows["step", "timm"]["attention"] == "torch" and rows["step", "dense"]["attention"] in ("flash", "math")
    beside = [facts["ms"] for (part, name), facts in rows.items() if part == "profile" and name not in ("dense", "tokens 0.7")]
    assert len(beside) == 5 and min(beside) > 0 and rows["profile", "bookkeeping of examples, eager"]["method"] == "forgetting"
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
        "triton_poi_fused_addmm_gelu_0",
        "void at::native::sort",
        "pytorch_flash::flash_fwd",
        "ncclDevKernel_AllReduce",
        "void at::native::GammaBetaBackwardCUDAKernel",
        "sm80_xmma_wgrad_implicit_gemm_indexed",
        "aten::mm",
        "xyz",
    )
    assert [kernels.class_of(name) for name in names] == [
        "reduction and norm", "elementwise", "sort and gather", "attention", "communication", "other",
        "convolution", "product", "other",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_facts_run_engine_and_input_in_their_tiny_form(capsys: Any) -> None:
    code, message = gpu.main(["facts", "run", "resume", "engine", "input"]), capsys.readouterr().out
    assert code == 0, message
    assert (
        "attention that weighs keys, 69 tokens" in message
        and "math_ms" in message
        and "same_batches true" in message
        and "ours" in message
    )


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
