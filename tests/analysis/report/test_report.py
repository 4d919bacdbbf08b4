"""The closing table and the plot agree with the journal, for whole, killed, resumed and empty runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import unquote

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console as Terminal

from tests.support.journals import START, lines, write
from trainer.analysis.history import history
from trainer.analysis.mlflow_pages import page_of_comparison, page_of_run
from trainer.analysis.report.picture import draw_kept, picture
from trainer.analysis.report.summary import summary
from trainer.journal.file import JournalError


def cells(run: Path) -> dict[str, tuple[str, str]]:
    return {row.what: (row.value, row.note) for row in summary(run).rows}


def test_table_of_a_finished_run(tmp_path: Path):
    run = write(tmp_path / "tri", lines())
    table = summary(run)
    assert table.title == summary(run / "journal.jsonl").title == "tri: finished, 30 steps, epoch 4"
    rows = cells(run)
    # 2 epochs x 400 + 2 x 200 images at 100/s, four evaluations of .5 s
    assert rows["images/s"][0] == "100" and rows["time"] == (
        "0:14",
        "0:12 of it in training steps; 1,200 images; without start-up and lost steps",
    )
    assert rows["top-1"] == ("84.38 %", "of 400 images; best 84.38 % at epoch 4") and rows["top-1, EMA"][0] == "85.38 %"
    assert rows["kept examples"] == ("75.0 %", "mean over epochs; 50.0 % at the end")
    # two of four blocks at half the tokens, for 400 of 1,200 images
    assert rows["kept tokens"] == ("91.7 %", "of all blocks, mean over images; 75.0 % at the end")
    assert rows["kept connections"] == ("83.3 %", "mean over images; 50.0 % at the end")
    # 800 x 100 + 400 x 50 of 1,600 x 100
    assert rows["multiply-adds"] == ("1e+05", "forward, 37.5 % less than dense on every example")
    assert rows["device hours"][0] == f"{14 * 2 / 3600:.3g}"
    assert "goodput" not in rows
    *before, end = lines()
    better = [
        before[0],
        *({**line, "goodput": 0.874, "time_to_first_step": 10.2} if line["kind"] == "step" else line for line in before[1:]),
    ]
    good = cells(write(tmp_path / "good", [*better, end]))["goodput"]
    assert good[0] == "87.4 %" and good[1].startswith("of the wall time") and good[1].endswith("first step after 10 s")
    out = io.StringIO()
    Terminal(file=out, width=120).print(table.table)
    for text in (out.getvalue(), table.text, table.markdown):
        assert "84.38 %" in text and "kept examples" in text and "91.7 %" in text
    assert {line.count("|") for line in table.markdown.splitlines()[2:]} == {4}


def test_killed_and_resumed_run_counts_the_lineage_once(tmp_path: Path):
    """Killed at step 20 behind a checkpoint at 10 and gone on an hour later: the same table as the uninterrupted run."""
    whole = list(lines())
    first = [line for line in whole if line.get("step", 0) <= 20]
    again = [dict(whole[0]), {"kind": "resume", "step": 10, "epoch": 1, "batch": 0}]
    again += [line for line in whole if line.get("step", 0) > 10 or (line["kind"], line.get("epoch")) == ("epoch", 1)]
    shift = 3600 + next(line["time"] for line in whole if line.get("step") == 20) - whole[0]["time"]
    begin = next(line["time"] for line in whole if line.get("step", 0) > 10 and line["kind"] == "step") - 0.8
    for line in again:
        line.setdefault("time", whole[0]["time"])
    again = [line | {"attempt": 1, "time": max(line["time"], begin) + shift} for line in again]
    run = write(tmp_path / "tri", [*first, *again])
    rows, expected = cells(run), cells(write(tmp_path / "whole", lines()))
    assert rows.pop("attempts")[0] == "2"
    hours = [float(found.pop("device hours")[0]) for found in (rows, expected)]
    assert hours[0] > hours[1], "of lost steps too: they were paid for"
    assert rows == expected
    assert history(run).last.trained == pytest.approx(12) and history(run).last.elapsed == pytest.approx(14)


def test_the_kept_share_of_weights_is_drawn_too(tmp_path: Path):
    whole = list(lines())
    pruned = {"kind": "weights", "time": whole[-1]["time"], "attempt": 0, "step": 30, "kept": 0.25}
    for run, expected in ((whole, ()), ([*whole[:-1], pruned, whole[-1]], ("weights",))):
        axes = Figure().subplots()
        draw_kept(axes, history(write(tmp_path / str(len(run)), run)), 1.0)
        curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        assert tuple(curves) == ("examples", "tokens", "connections", *expected)
        assert curves.get("weights", [100, 25, 25]) == [100, 25, 25]


def test_phases_add_up_to_a_step_and_communication_lies_within_them(tmp_path: Path):
    shares = {"data_wait": 0.05, "forward": 0.3, "backward": 0.5, "optimizer": 0.15, "communication": 0.4}
    phases = {name: {"median": share} for name, share in shares.items()}
    run = write(tmp_path / "tri", (line | {"phases": phases} if line["kind"] == "step" else line for line in lines()))
    wanted = "of a sampled step; data wait 5, forward 30, optimizer 15; exposed communication, within these: 40"
    assert cells(run)["backward"] == ("50 %", wanted)


def test_an_attempt_that_failed_before_its_start_line_counts_its_devices_alone(tmp_path: Path):
    """An hour after a run of 100 s on 2 processes, an attempt on 4 fails 30 s after its begin; then one goes on. No time passes in it."""
    failed = {"kind": "end", "status": "failed", "reason": "no GPU", "step": 0, "starting": 30.0, "world": 4}
    first = [{"kind": "start", "time": 100.0} | START, {"kind": "step", "time": 200.0, "step": 10, "images": 1, "seconds": 9.0}]
    attempts = [first, [{"time": 3800.0} | failed], [{"kind": "start", "time": 9000.0, "starting": 10.0} | START]]
    numbered = [line | {"attempt": number} for number, found in enumerate(attempts) for line in found]
    last = history(write(tmp_path / "run", numbered[:3])).last
    assert (last.elapsed, last.device_seconds, last["reason"]) == (100.0, 2 * 100 + 4 * 30, "no GPU")
    resumed = {"kind": "resume", "time": 9000.0, "attempt": 2, "step": 10}
    going = [*numbered, resumed, {"kind": "step", "time": 9040.0, "attempt": 2, "step": 20, "images": 1, "seconds": 9.0}]
    last = history(write(tmp_path / "going", going)).last
    assert (last.elapsed, last.device_seconds) == (140.0, 2 * 100 + 4 * 30 + 2 * 50)
    alone = history(write(tmp_path / "alone", [{"time": 50.0, "attempt": 0} | failed]))
    assert (alone.status, alone.last.elapsed, alone.last.device_seconds) == ("failed", 0.0, 120.0)
    summary(write(tmp_path / "message", [{"kind": "message", "time": 1.0, "attempt": 0, "text": "x"}]))


def test_work_of_a_window_over_two_plans_is_of_both(tmp_path: Path):
    """A log line after steps 8 and 20; the plan changes and half of the examples go behind step 14, so half of twelve steps is cheap."""
    lines = [{"kind": "start"} | START, {"kind": "epoch", "epoch": 0, "step": 0, "kept": 400, "examples": 400}]
    lines += [{"kind": "plateau", "step": 0, "multiply_adds": 100.0}, {"kind": "step", "step": 8, "images": 80, "seconds": 1.0}]
    lines += [
        {"kind": "epoch", "epoch": 1, "step": 14, "kept": 200, "examples": 400},
        {"kind": "plateau", "step": 14, "multiply_adds": 50.0},
    ]
    lines += [{"kind": "step", "step": 20, "images": 120, "seconds": 1.0}]
    last = history(write(tmp_path, [{"time": 1.0, "attempt": 0} | line for line in lines])).last
    assert last.multiply_adds == 80 * 100 + 60 * 100 + 60 * 50
    assert last.dense_multiply_adds == 80 * 100 + 60 * 100 + 60 * 100 / 0.5


def test_a_checkpoint_line_of_an_earlier_step_does_not_set_the_run_back(tmp_path: Path):
    """It is written once the checkpoint is on disk, which may be after lines of later steps."""
    lines = [{"kind": "start"} | START, {"kind": "step", "step": 10, "images": 100, "seconds": 1.0}]
    lines += [{"kind": "checkpoint", "step": 8, "path": "step-8"}]
    found = history(write(tmp_path, [{"time": 1.0, "attempt": 0} | line for line in lines]))
    assert found.last.step == 10 and [point.step for point in found.of("checkpoint")] == [10]


def test_running_and_empty_runs(tmp_path: Path):
    run = write(tmp_path / "tri", [{"kind": "start", "time": 1.0, "attempt": 0} | START])
    assert summary(run).title == "tri: running, 0 steps, epoch 0" and set(cells(run)) == {"time", "device hours"}
    assert picture(run).stat().st_size > 1000
    write(run, [{"kind": "end", "time": 2.0, "attempt": 0, "status": "failed", "reason": "disk full"}])
    assert summary(run).title == "tri: failed: disk full, 0 steps, epoch 0"
    stopped = {"kind": "end", "status": "stopped", "reason": "stop_at=1.5ep", "step": 6, "progress": 1.5}
    logged = {"kind": "step", "step": 5, "progress": 1.0}
    write(run, [{"time": 1.5, "attempt": 0} | logged, {"time": 2.0, "attempt": 0} | stopped])
    assert summary(run).title == "tri: stopped: stop_at=1.5ep, 6 steps, epoch 1.5", "the last step, not the last logged one"
    with pytest.raises(JournalError, match="no such journal"):
        summary(tmp_path / "other")


def test_picture_shows_the_run(tmp_path: Path):
    path = picture(write(tmp_path / "tri", lines()))
    assert path == tmp_path / "tri" / "report.png"
    image = matplotlib.image.imread(path)[..., :3]
    height, width, _ = image.shape
    assert 900 < height < 1300 and 900 < width < 1300
    drawn = lambda color: np.abs(image - np.array(color) / 255).max(-1) < 0.02  # noqa: E731
    blue, red = drawn((0x00, 0x72, 0xB2)), drawn((0xD5, 0x5E, 0x00))
    assert blue[: height // 2].sum() > 300 and red[height // 3 : 3 * height // 4].sum() > 300
    dense = picture(write(tmp_path / "dense", lines(sparse=False)), tmp_path / "elsewhere" / "x.png")
    assert dense.is_file() and not (tmp_path / "dense" / "report.png").exists()


def test_the_curves_are_the_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr("trainer.analysis.report.picture.plain", drawn.append)
    run = history(write(tmp_path / "tri", lines()))
    picture(run)
    for line, ema in zip(drawn[0].lines, (False, True), strict=True):
        assert list(line.get_ydata()) == pytest.approx([100 * point["top1"] for point in run.evals(ema)])
        assert list(line.get_xdata()) == pytest.approx([point.elapsed for point in run.evals(ema)])  # in seconds: 14 of them


def test_page_of_run(tmp_path: Path):
    assert page_of_run(tmp_path) == f"not in MLflow yet; to upload it: trilevel sync {tmp_path}"
    state = {"uri": "sqlite:////x/runs/mlflow.db", "run_id": "abc", "experiment_id": "1"}
    (tmp_path / "mlflow.json").write_text(json.dumps(state))
    assert page_of_run(tmp_path).startswith("mlflow ui --backend-store-uri sqlite:////x/runs/mlflow.db ")
    (tmp_path / "mlflow.json").write_text(json.dumps(state | {"uri": "http://host:5000/"}))
    assert page_of_run(tmp_path) == "http://host:5000/#/experiments/1/runs/abc"


def test_page_of_comparison(tmp_path: Path):
    """MLflow's own route: compare-runs with JSON lists of runs and experiments (static/js of mlflow 3: getCompareRunPageRoute)."""
    states = {
        "a": ("http://host:5000", "ra", "1"),
        "b": ("http://host:5000", "rb", "2"),
        "other": ("http://elsewhere", "rc", "1"),
    }
    for name, (uri, run, experiment) in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": run, "experiment_id": experiment}))
    (tmp_path / "not uploaded").mkdir()
    page = page_of_comparison([tmp_path / "a", tmp_path / "b"])
    assert unquote(page) == 'http://host:5000/#/compare-runs?runs=["ra","rb"]&experiments=["1","2"]'
    for others in (["a"], ["a", "other"], ["a", "b", "not uploaded"]):
        assert page_of_comparison([tmp_path / name for name in others]) == ""
