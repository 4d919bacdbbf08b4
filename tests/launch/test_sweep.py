"""`launch sweep`: names, grids, what is left to do, one array; and a real sequence that is restarted."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import launch.__main__ as program
from launch import slurm, sweep
from launch.job import LaunchError, Nodes

RENDERED = Path(__file__).parent / "rendered"


def config(folder: Path, name: str) -> str:
    (folder / f"{name}.yaml").write_text(f"name: {name}\nruns: {folder}/runs\n")
    return str(folder / f"{name}.yaml")


def test_every_point_has_a_name_and_settings_of_its_own(tmp_path):
    configs = [config(tmp_path, "a"), config(tmp_path, "b")]
    found = sweep.points(configs, ["epochs=2"], ["optim.lr=1e-3,2e-3", "tokens.blocks=[1, 2],[3]"], "0,1", "ab")
    assert len(found) == len({point.name for point in found}) == 16
    assert found[1].name == "ab-a-lr1e-3-blocks_1_2_-seed1" and found[1].directory == tmp_path / "runs" / found[1].name
    assert found[1].job.overrides == (
        "epochs=2", "optim.lr=1e-3", "tokens.blocks=[1, 2]", f"name={found[1].name}", "seed=1", "tracking.parent=ab",
    )  # fmt: skip
    assert all(point.job.resume for point in found) and len(sweep.distinct_settings(found)) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep a.yaml --seeds 0,x", "--seeds 0,x"),
        ("sweep a.yaml --seeds 1,1", "distinct integers"),
        ("sweep a.yaml --set optim.lr", "--set optim.lr"),
        ("sweep a.yaml --set optim.lr=1,1", "distinct values"),
        ("sweep a.yaml --seeds 0,\u00b2", "distinct integers"),
        ("sweep a.yaml --set seed=1,2", "--set seed=...: give each setting once; use --seeds"),
        ("sweep a.yaml --set optim.lr=1 --set optim.lr=2", "--set optim.lr=...: give each setting once"),
        ("sweep a.yaml name=x", "name=... is set by the sweep"),
        ("sweep a.yaml optim.lr=1 --set optim.lr=1,2", "optim.lr=... is set by the sweep"),
        ("sweep a.yaml a.yaml", "would name two runs"),
        ("sweep b.yaml", "config b.yaml: no such file; did you mean '"),
        ("sweep twice.yaml", "config twice.yaml: name: given twice in the mapping of line 1"),
        ("sweep a.yaml --gpus 8 --at-once 2", "--gpus, --at-once without --slurm"),
        ("sweep a.yaml --nodes 2", "--nodes without --slurm"),
        ("sweep c.yaml", "c.yaml: not UTF-8 text"),
        ("sweep seed=1", "no CONFIG given"),
        ("sweep a.yaml --sed 1", "did you mean '--seeds'?"),
    ],
)
def test_sweeps_that_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "a")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main(words.split()) == 2
    assert message in capsys.readouterr().err


def write(point: sweep.Point, *rows: dict) -> None:
    point.directory.mkdir(parents=True)
    (point.directory / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind":"st')


def test_where_a_run_stands_is_read_from_its_journal(tmp_path):
    points = sweep.points([config(tmp_path, "a")], [], [], "0,1,2,3", "s")
    begin, score = {"kind": "start"}, {"kind": "eval", "top1": 0.75}
    write(points[0], begin, score, {"kind": "end", "status": "finished"})
    write(points[1], begin, {"kind": "end", "status": "stopped"})
    write(points[2], begin, {"kind": "end", "status": "stopped"}, begin)
    found = [sweep.with_status(point) for point in points]
    assert [point.state for point in found] == ["finished", "stopped", "cut off", "new"]
    text = sweep.table(found)
    assert "75.00%" in text and text.endswith(f"trilevel compare {points[0].directory}")


def test_an_array_has_a_task_for_each_run_and_is_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/a.yaml").write_text("name: a\n")
    found = sweep.points(["configs/a.yaml"], [], ["tokens.blocks=[1, 2],[3]"], "0,1", "grid")
    jobs, runs = [p.job for p in found], [str(p.directory) for p in found]
    request = slurm.SlurmRequest(nodes=Nodes(2, 2), processes=8, gpus=8, time="60")
    text = slurm.render_array(jobs, request, "/env/bin/python", "grid", runs, at_once=2)
    assert text == (RENDERED / "sweep_array.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    with pytest.raises(LaunchError, match="--at-once 0"):
        slurm.render_array(jobs, request, "python", "grid", runs, at_once=0)


def test_a_sweep_leaves_out_finished_runs_and_prints_how_to_compare(tmp_path, monkeypatch, capsys):
    """Starts are recorded, a journal is written in place of training: seed 1 fails at first; started again, only that one is trained."""
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "a")
    asked: list[str] = []
    codes = {"1": 1}

    def start(command) -> int:
        given = dict(word.split("=", 1) for word in command.argv if "=" in word)
        asked.append(given["seed"] + ("c" if "--check" in command.argv else "t"))
        if "--check" in command.argv or codes.get(given["seed"]):
            return codes.get("check", 0) if "--check" in command.argv else codes[given["seed"]]
        point = sweep.Point(None, given["name"], tmp_path / "runs" / given["name"])
        write(point, {"kind": "end", "status": "finished"})
        parent = {"tracking": {"parent": given["tracking.parent"]}}
        settings = {"name": given["name"], "seed": int(given["seed"]), "optim": {"lr": 0.001}} | parent
        (point.directory / "config.yaml").write_text(json.dumps(settings))
        return 0

    monkeypatch.setattr(program, "start", start)
    words = ["sweep", "a.yaml", "--seeds", "0,1,2", "--processes", "1"]
    assert program.main(words) == 1 and asked == ["0c", "0t", "1t", "2t"]
    message = capsys.readouterr().out
    assert "sweep-a-seed1  new" in message and "trilevel compare" in message
    codes["1"] = 75  # a signal: the sweep ends there
    assert program.main([*words, "--seeds", "1,3"]) == 75 and asked[4:] == ["1c", "1t"]
    codes.clear()
    assert program.main(words) == 0 and asked[6:] == ["1c", "1t"]
    assert program.main(words) == 0 and len(asked) == 8 and capsys.readouterr().out.count("finished") >= 3
    assert program.main([*words, "--seeds", "4", "--dry-run"]) == 0 and len(asked) == 8
    assert "seed=4" in capsys.readouterr().out
    assert program.main([*words, "optim.lr=1e-3"]) == 0 and len(asked) == 8, "the value of the finished runs, in another form"
    capsys.readouterr()
    codes["check"] = 2  # the trainer refuses other settings than those of the checkpoint
    assert program.main([*words, "optim.lr=2e-3"]) == 2 and asked[8:] == ["0c"] and "finished" not in capsys.readouterr().out
    os.utime("a.yaml", (2e9, 2e9))  # edited since
    assert program.main(words) == 2 and asked[9:] == ["0c"]


def test_runs_of_a_sweep_hang_below_one_run_in_mlflow(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    from trainer.tracking.mlflow_client import Store

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    one, two = (Store(uri, tmp_path).find_or_make("e", name, name, 1.7e9, parent="grid")[1] for name in ("a", "b"))
    other = Store(uri, tmp_path).find_or_make("e", "c", "c", 1.7e9)[1]
    client = MlflowClient(tracking_uri=uri)
    above = [client.get_run(run).data.tags.get("mlflow.parentRunId") for run in (one, two, other)]
    assert above[0] == above[1] and above[0] is not None and above[2] is None
    parent = client.get_run(above[0])
    assert parent.info.run_name == "grid" and parent.info.status == "FINISHED"
