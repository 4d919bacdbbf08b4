"""`launch study`: files of studies, names and order of runs, what counts as finished, kept journals, runs side by side."""

from __future__ import annotations

import json
import lzma
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import launch.__main__ as program
from launch import kept_journals, study, study_file, yaml_file
from launch.job import Command, LaunchError
from launch.side_by_side import start_side_by_side
from launch.study_file import as_setting
from tests.conftest import ROOT
from tests.support.journals import lines, write
from trainer.config.load import load
from trainer.config.strict_yaml import load_yaml
from trainer.model.build import build_objective, build_schedule

STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
MINI = """
name: mini
question: Does it count?
config: a.yaml
reference: dense
seeds: [0, 1]
settings: {control: 0}
arms:
  dense: {}
  sparse: {optim.lr: 1e-3, examples: {method: forgetting, window: 7ep, updates: 5}, tokens.blocks: [1, 3]}
  third: {tokens: {method: topk, fuse: true}}
"""


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: a\n")
    Path("mini.yaml").write_text(MINI)
    return "mini.yaml"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_every_study_is_a_valid_run_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    read = study_file.read(str(path.relative_to(ROOT)))
    assert read.name == path.stem
    found = study.runs(read, [], [0], list(read.arms), "none")
    configs = [load(run.point.job.config, list(run.point.job.overrides)) for run in found]
    for config in configs:
        build_schedule(config)
        build_objective(config)
        assert config.tokens.settings.final_keep == 1 or max(config.tokens.blocks) < (config.model.args.get("depth") or 12)
        if config.examples.method == "forgetting":  # every window fills, and is followed by epochs that use its update
            settings: Any = config.examples.settings
            assert settings.window * settings.updates <= config.epochs
    plain = [config.model_dump(exclude={"name"}) for config in configs]
    assert all(plain.count(one) == 1 for one in plain), "two arms are the same"


def five_times(text: str) -> str:
    """With every duration, the epochs of a run, and the names that contain them five times as long."""
    return re.sub(r"(?<![\d.])(\d+)(?=ep\b)|(?<=^epochs=)(\d+)", lambda found: str(5 * int(found[0])), text)


def test_the_full_study_has_the_arms_and_questions_of_the_short_one_five_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short, full = (study_file.read(f"configs/studies/{name}.yaml") for name in ("cifar10", "cifar10_full"))
    own = [(read, len(read.arms["dense"])) for read in (short, full)]  # the settings of all arms
    arms = [{arm: words[shared:] for arm, words in read.arms.items()} for read, shared in own]
    assert list(arms[1]) == [five_times(arm) for arm in arms[0]]
    assert list(arms[1].values()) == [tuple(map(five_times, words)) for words in arms[0].values()]
    name = dict(zip(arms[0], arms[1], strict=True))
    assert list(full.questions) == [(name[arm], name[reference]) for arm, reference in short.questions]
    assert (full.seeds, full.reference, full.config) == (short.seeds, short.reference, short.config)
    base, scaled = (load(read.config, list(read.arms["dense"])) for read in (short, full))
    assert (scaled.epochs, scaled.optim.warmup) == (5 * base.epochs, 5 * base.optim.warmup)
    assert 10_000 // base.data.batch == 50_000 // scaled.data.batch and scaled.data.batch % (3 * scaled.data.lanes) == 0
    assert scaled.optim.lr == base.optim.lr and (scaled.engine.kind, scaled.engine.compile) == ("ddp", True)


ON_IMAGENET = {  # arms of cifar10.yaml under the names of imagenet.yaml, whose head comment has the reasons
    "dense_11ep": "dense_172ep", "dense_12ep": "dense_182ep", "dense_14ep": "dense_210ep", "dense_16ep": "dense_241ep", "repeats": "dense",
    "forgetting": "forgetting_clear", "mixed_dense": "dense", "mixed_random": "random_epoch",
    "connections_exact": "connections_exact_0.5", "connections_exact_0.1": "connections_exact",
} | {f"mixed_{rule}": f"forgetting_{rule}" for rule in ("clear", "authors", "without_partner", "dominant", "probe")}  # fmt: skip
OTHER_PAIRS = {
    ("repeats", "dense"): {"dense", "without_repeats"},
    ("connections_exact", "connections_shared"): {"connections_exact", "connections_shared"},
}


def test_every_question_of_cifar10_has_a_counterpart_on_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short, imagenet = (study_file.read(f"configs/studies/{name}.yaml") for name in ("cifar10", "imagenet"))
    asked = [{*pair} for pair in imagenet.questions]
    missing = [
        pair for pair in short.questions
        if OTHER_PAIRS.get(pair, {ON_IMAGENET.get(arm, arm) for arm in pair}) not in asked
    ]  # fmt: skip
    assert not missing
    assert {arm for pair in imagenet.questions for arm in pair} == {*imagenet.arms}, "an arm that no question needs"


def test_values_are_those_that_the_trainer_reads_of_the_same_words(tmp_path: Path) -> None:
    """By YAML 1.1 `on` is true, `1:30` is 90, 017 is 15 and 1e-3 a text; and quotes keep a text one."""
    words = "{a: on, b: 1:30, c: 017, d: 1e-3, e: '017', f: true, g: ~, h: 2024-01-01, i: [.5, 'no', \"a b\"], j: {k: -1.0E+5}}"
    (tmp_path / "study.yaml").write_text(f"arms: {words}")
    read = yaml_file.read("study", str(tmp_path / "study.yaml"), "x")["arms"]
    assert read == load_yaml(words) == {key: load_yaml(as_setting(value)) for key, value in read.items()}
    assert (read["a"], read["b"], read["c"], read["e"]) == ("on", "1:30", 17, "017")


def test_runs_are_named_and_ordered_with_seeds_outermost(mini: str) -> None:
    read = study_file.read(mini)
    found = study.runs(read, ["epochs=1"], [0, 1], ["third", "dense"], "kept")
    assert [run.point.name for run in found] == ["mini-dense-seed0", "mini-third-seed0", "mini-dense-seed1", "mini-third-seed1"]
    assert found[3].kept == Path("kept/mini/third-seed1.jsonl.xz")
    assert found[3].point.job.overrides == (
        "control=0", "tokens={method: topk, fuse: true}", "epochs=1", "name=mini-third-seed1", "seed=1", "tracking.parent=mini",
    )  # fmt: skip
    assert read.questions == (("sparse", "dense"), ("third", "dense"))
    assert read.arms["sparse"][1:] == (
        "optim.lr=0.001", "examples={method: forgetting, window: 7ep, updates: 5}", "tokens.blocks=[1, 3]",
    )  # fmt: skip


def test_a_value_may_name_the_seed(mini: str) -> None:
    text = Path(mini).read_text().replace("dense: {}", 'dense: {model.init: "runs/mini-third-seed{seed}/weights.safetensors"}')
    Path(mini).write_text(text)
    found = study.runs(study_file.read(mini), [], [0, 7], ["dense"], "kept")
    inits = [word for run in found for word in run.point.job.overrides if word.startswith("model.init")]
    assert [word.split("seed")[1][0] for word in inits] == ["0", "7"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("reference: dense", "reference: dens", "reference=dens: unknown arm; did you mean 'dense'?"),
        ("arms:", "views: {half: [sparse]}\narms:", "views.half=['sparse']: must be [arm, density] under a name of its own"),
        ("arms:", "views: {dense: [sparse, 0.5]}\narms:", "views.dense=['sparse', 0.5]: must be [arm, density]"),
        ("arms:", "views: {half: [spars, 0.5]}\narms:", "views.half=spars: unknown arm; did you mean 'sparse'?"),
        ("arms:", "views: [half]\narms:", "must map names to [arm, density]"),
        ("question:", "questoin:", "questoin: unknown key; did you mean 'question'?"),
        ("name: mini", "", "name: required key is missing"),
        ("config: a.yaml", "config: b.yaml", "config=b.yaml: no such file"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds=[0, 0]: must be distinct integers"),
        ("  dense: {}", "  dense: {}\n  dense: {}", "dense: given twice in the mapping of line"),
        ("  dense: {}", "  dense: 3", "arms.dense=3: must be a mapping of settings"),
        ("  dense: {}", "  dense: {seed: 3}", "arms.dense.seed: set by the study itself"),
        ("  dense: {}", "  a/b: {}\n  dense: {}", "arms=a/b: must be letters"),
        ("seeds:", "questions: [[third, spars]]\nseeds:", "questions=spars: unknown arm; did you mean 'sparse'?"),
        ("seeds:", "questions: [third]\nseeds:", "must be two arms"),
        ("seeds:", "later: [third]\nseeds:", "later: 'third': must be two arms"),
        ("arms:", "arms: [", "not valid YAML"),
        ("  dense: {}", "  dense: &own {plan: *own}", "arms.dense.plan: contains an alias of itself"),
    ],
)
def test_files_that_are_refused(mini: str, old: str, new: str, expected: str) -> None:
    Path(mini).write_text(MINI.replace(old, new, 1))
    with pytest.raises(LaunchError) as error:
        study_file.read(mini)
    assert expected in str(error.value) and mini in str(error.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mimi.yaml", "mimi.yaml: no such file; did you mean 'mini.yaml'?"),
        ("mini.yaml --arms dense,spars", "--arms=spars: unknown arm; did you mean 'sparse'?"),
        ("mini.yaml --seeds 0,x", "--seeds 0,x"),
        ("mini.yaml --jobs 0", "--jobs 0: at least 1"),
        ("mini.yaml epochs=1", "epochs=1: differs from the study"),
        ("mini.yaml epochs=1 --journals kept", "epochs=1: differs from the study"),
        ("mini.yaml seed=1", "seed=1"),
        ("mini.yaml --job 1", "did you mean '--jobs'?"),
    ],
)
def test_commands_that_are_refused(mini: str, words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["study", *words.split()]) == 2
    assert expected in capsys.readouterr().err


def finished(folder: Path) -> Path:
    first, *rest = lines(seed=1)
    where = {"host": "node7", "hosts": ["node7"], "config": first["config"] | {
        "runs": "/home/someone/runs", "tracking": {"to": "mlflow", "uri": "http://me:secret@server/", "tags": {"who": "me"}}}}  # fmt: skip
    return write(folder, [first | where, {"kind": "system", "time": 1.0, "node7": {"cpu": 1}},
                          {"kind": "unknown", "time": 1.0, "where": "node7"}, *rest])  # fmt: skip


def test_a_kept_journal_counts_as_finished_and_names_no_host_or_user(mini: str, capsys: pytest.CaptureFixture[str]) -> None:
    finished(Path("runs/mini-sparse-seed1"))
    assert program.main(["study", mini, "--keep", "--journals", "kept"]) == 0
    kept = Path("kept/mini/sparse-seed1.jsonl.xz")
    assert [*Path("kept").rglob("*.*")] == [kept] and "mini-sparse-seed1  finished" in capsys.readouterr().out
    text = lzma.decompress(kept.read_bytes()).decode()
    for word in ("node7", "someone", "secret", "server", "system", '"me"', "/home"):
        assert word not in text
    start, *rest = map(json.loads, text.splitlines())
    assert start["config"]["runs"] == "runs" and start["config"]["optim"] == {"lr": 1e-3, "name": "adamw"}
    assert start["hosts"] == ["host0"] and rest[-1]["status"] == "finished"
    Path("runs").rename("gone")  # another machine
    read = study_file.read(mini)
    states = {run.point.name: run.point for run in study.runs(read, [], [1], list(read.arms), "kept")}
    assert [point.state for point in states.values()] == ["new", "finished", "new"]
    assert states["mini-sparse-seed1"].top1 == pytest.approx(rest[-3]["top1"])
    program.main(["study", mini, "--journals", "kept", "--dry-run", "--seeds", "1"])
    trained = [line for line in capsys.readouterr().out.splitlines() if "--check" not in line]
    assert len(trained) == 2 and not any("name=mini-sparse-seed1" in line for line in trained)


def test_a_damaged_kept_journal_is_named(mini: str) -> None:
    path = kept_journals.path_of("kept", "mini", "dense", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not xz")
    with pytest.raises(LaunchError, match=r"dense-seed0\.jsonl\.xz: not a whole \.xz file"):
        study.runs(study_file.read(mini), [], [0], ["dense"], "kept")


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        ("/home/me/shards/train-*.tar", "train-*.tar"),
        ("shards/digits/train-*.tar", "shards/digits/train-*.tar"),
        ("~/x/y.tar", "y.tar"),
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("http://me:word@host/a.tar?sign=1", "http://host/a.tar?"),
        ("CPU (x86_64), images/s", "CPU (x86_64), images/s"),
    ],
)
def test_texts_of_kept_journals(text: str, neutral: str) -> None:
    assert kept_journals.neutral({"kind": "start", "pattern": text}, set())["pattern"] == neutral


def test_at_most_two_runs_at_a_time_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w').write('x'); time.sleep(0.5); print('done'); sys.exit(int(sys.argv[2]))"
    commands = {
        name: Command((sys.executable, "-c", code, str(tmp_path / name), str(number)))
        for name, number in (("a", 3), ("b", 0), ("c", 0))
    }
    most, ended = [], []

    def note(name: str) -> None:
        ended.append(name)
        most.append(sum((tmp_path / other).exists() for other in commands))

    assert start_side_by_side(commands, 2, tmp_path / "logs", note) == {"a": 3, "b": 0, "c": 0}
    assert most[0] == 2 and sorted(ended) == ["a", "b", "c"]
    assert (tmp_path / "logs" / "b" / "output.txt").read_text() == "done\n"


def test_a_signal_reaches_every_run_and_starts_no_other(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "open(sys.argv[1], 'w').write('x'); time.sleep(60)"
    )
    commands = {name: Command((sys.executable, "-c", code, str(tmp_path / name))) for name in "abc"}

    def send() -> None:
        while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    assert start_side_by_side(commands, 2, tmp_path / "logs", lambda name: None) | {"c": 0} == {"a": 75, "b": 75, "c": 0}
    thread.join()
    assert not (tmp_path / "c").exists() and signal.getsignal(signal.SIGTERM) == before


def test_a_study_trains_the_unfinished_runs_and_keeps_their_journals(mini: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is replaced: it writes a journal. Arm `third` fails, and is the only one left afterwards."""
    asked: list[str] = []

    def start(command: Command, *_: object) -> int:
        given = dict(word.split("=", 1) for word in shlex.split(command.text()) if "=" in word)
        if "--check" in command.argv:
            return 0
        asked.append(given["name"])
        if "third" not in given["name"]:
            write(Path("runs") / given["name"], list(lines(seed=int(given["seed"]))))
        return int("third" in given["name"])

    monkeypatch.setattr(study, "start", start)
    words = ["study", mini, "--journals", "kept", "--processes", "1"]
    assert program.main(words) == 1
    assert asked == [f"mini-{arm}-seed{seed}" for seed in (0, 1) for arm in ("dense", "sparse", "third")]
    assert len(list(Path("kept/mini").iterdir())) == 4
    asked.clear()
    assert program.main([*words, "--check"]) == 0 and not asked
    assert program.main(words) == 1 and asked == ["mini-third-seed0", "mini-third-seed1"]
