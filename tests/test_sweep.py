"""`launch sweep`: names, grids, what is left to do, one array; and a real sequence that is restarted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import launch.__main__ as program
from launch import slurm, sweep
from launch.job import LaunchError, Nodes
from tests import told
from tests.conftest import environment

folder = told.folder  # the fixture
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
    assert all(point.job.resume for point in found) and len(sweep.unlike(found)) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sweep a.yaml --seeds 0,x", "--seeds 0,x"),
        ("sweep a.yaml --seeds 1,1", "different whole numbers"),
        ("sweep a.yaml --set optim.lr", "--set optim.lr"),
        ("sweep a.yaml --set optim.lr=1,1", "different values"),
        ("sweep a.yaml name=x", "name=... is set by the sweep"),
        ("sweep a.yaml optim.lr=1 --set optim.lr=1,2", "optim.lr=... is set by the sweep"),
        ("sweep a.yaml a.yaml", "the name of two runs"),
        ("sweep b.yaml", "b.yaml: No such file"),
        ("sweep seed=1", "no configuration"),
        ("sweep a.yaml --sed 1", "did you mean --seeds?"),
    ],
)
def test_sweeps_that_are_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "a")
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main(words.split()) == 2
    assert said in capsys.readouterr().err


def write(point: sweep.Point, *rows: dict) -> None:
    point.directory.mkdir(parents=True)
    (point.directory / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind":"st')


def test_where_a_run_stands_is_read_from_its_journal(tmp_path):
    points = sweep.points([config(tmp_path, "a")], [], [], "0,1,2,3", "s")
    begin, score = {"kind": "start"}, {"kind": "eval", "top1": 0.75}
    write(points[0], begin, score, {"kind": "end", "status": "finished"})
    write(points[1], begin, {"kind": "end", "status": "stopped"})
    write(points[2], begin, {"kind": "end", "status": "stopped"}, begin)
    found = [sweep.standing(point) for point in points]
    assert [point.state for point in found] == ["finished", "stopped", "cut off", "new"]
    text = sweep.table(found)
    assert "75.00%" in text and text.endswith(f"trilevel compare {points[0].directory}")


def test_an_array_has_a_task_for_each_run_and_is_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/a.yaml").write_text("name: a\n")
    jobs = [p.job for p in sweep.points(["configs/a.yaml"], [], ["tokens.blocks=[1, 2],[3]"], "0,1", "grid")]
    request = slurm.Request(nodes=Nodes(2, 2), processes=8, gpus=8, time="60")
    text = slurm.render_array(jobs, request, "/env/bin/python", "grid", at_once=2)
    assert text == (RENDERED / "sweep_array.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    with pytest.raises(LaunchError, match="--at-once 0"):
        slurm.render_array(jobs, request, "python", "grid", at_once=0)


@pytest.mark.dist
def test_a_sequence_leaves_out_what_is_finished_and_says_how_to_compare(folder):
    """The trainer is a stand-in that writes a journal: seed 1 fails at first; started again, only that one is trained."""
    path = config(folder, "a")
    (folder / "trainer" / "__main__.py").write_text(
        "import json, pathlib, sys\n"
        "given = dict(word.split('=', 1) for word in sys.argv if '=' in word)\n"
        "open('asked', 'a').write(given['seed'] + ('c' if '--check' in sys.argv else 't') + ' ')\n"
        "if '--check' in sys.argv: sys.exit()\n"
        "if given['seed'] == '1' and not pathlib.Path('repaired').exists(): sys.exit(1)\n"
        "run = pathlib.Path('runs', given['name']); run.mkdir(parents=True)\n"
        "rows = [{'kind': 'start'}, {'kind': 'eval', 'top1': 0.5}, {'kind': 'end', 'status': 'finished'}]\n"
        "(run / 'journal.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))\n"
    )
    env = environment()
    env["PYTHONPATH"] = f"{folder}:{env['PYTHONPATH']}"
    words = [sys.executable, "-m", "launch", "sweep", path, "--seeds", "0,1,2", "--processes", "1"]

    def again() -> subprocess.CompletedProcess[str]:
        (folder / "asked").write_text("")
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)

    first = again()
    assert first.returncode == 1 and (folder / "asked").read_text().split() == ["0c", "0t", "1t", "2t"], first.stderr
    assert "sweep-a-seed1  new" in first.stdout and "trilevel compare" in first.stdout
    (folder / "repaired").touch()
    assert again().returncode == 0 and (folder / "asked").read_text().split() == ["1c", "1t"]
    third = again()
    assert third.returncode == 0 and (folder / "asked").read_text() == "" and third.stdout.count("finished") == 3
