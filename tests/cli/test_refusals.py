"""Bad input at the command line: one message that names the fault and a remedy, exit code 2, nothing written or lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.journals import lines, write
from trainer.__main__ import main
from trainer.data.shards.index import build_index
from trainer.journal.reader import lineage

RECIPE = """
name: job
epochs: 2
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 64, micro_batch: 64, workers: 0, lanes: 4}
augment: {crop: shift, shift: 2, flip: 0.0}
optim: {lr: 2.0e-3, warmup: 1ep}
tokens: {method: topk, keep: 0.7, blocks: [1, 2]}
engine: {kind: ddp, zero: 0, precision: float32}
tracking: {to: journal}
"""


@pytest.fixture
def job(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.replace("DIGITS", str(digits)))
    return path


def refused(capsys: Any, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr().err
    _, mark, message = f"\n{shown}".rpartition("\ntrilevel: ")  # behind the lines of progress
    assert mark and "Traceback" not in shown
    return message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=nowhere/train-*.tar", ["nowhere/train-*.tar", "no "]),
        ("model.name=deit_tny_patch16_224", ["model.name", "deit_tny_patch16_224", "deit_tiny_patch16_224"]),
        ("model.name=resnet50", ["resnet50"]),
        ("model={name: eva02_tiny_patch14_224, classes: 10, image_size: 28}", ["eva02_tiny_patch14_224", "Eva"]),
        ("model.classes=5", ["label", "model.classes=5", "model.classes=10"]),
        ("tokens.blocks=[2, 7]", ["tokens.blocks=[2, 7]", "blocks 0 to 3"]),
        ("tokens.method=topp", ["tokens.method='topp'", "topk"]),
        ("examples.method=forget", ["examples.method='forget'", "forgetting"]),
        ("examples.removed=0.2", ["examples.removed=0.2", "examples.method"]),
        ("data.batch=2048", ["2048"]),
        ("model.init=nowhere.safetensors", ["nowhere.safetensors"]),
        ("data.labels=key", ["data.labels='key'"]),
        ("optim.name=adamww", ["optim.name", "adamw"]),
    ],
)
def test_impossible_runs_are_refused_before_they_start(override: str, words: list[str], job: Path, capsys: Any) -> None:
    message = refused(capsys, "train", job, override, "--check")
    assert all(word in message for word in words), message
    assert not Path("runs").exists()


def test_a_batch_that_does_not_fit_the_world(job: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_WORLD", "64")
    assert "64" in refused(capsys, "train", job, "--check")
    monkeypatch.setenv("TRILEVEL_WORLD", "3")
    assert main(["train", str(job), "--check"]) == 0
    assert "3 process(es)" in capsys.readouterr().out


def test_the_check_prints_the_plan_and_trains_nothing(job: Path, capsys: Any) -> None:
    assert (
        main(["train", str(job), "plan.method=cosine", "plan.warmup=0ep", "plan.length=1ep", "plan.plateaus=2", "--check"]) == 0
    )
    message = capsys.readouterr().out
    assert "17x2 13x1 10x1" in message, message  # 16 patches and [CLS]: ceil(.7 x 16) = 12, ceil(.7 x 12) = 9
    assert "1438 training and 359 validation images" in message and not Path("runs").exists()
    assert "order: classes in a batch" in message


@pytest.fixture
def copied(job: Path, digits: Path) -> Path:
    """Shards of our own to be damaged, and the recipe over them."""
    shutil.copytree(digits, "mine")
    job.write_text(RECIPE.replace("DIGITS", "mine"))
    return sorted(Path("mine").glob("train-*.tar"))[1]


def test_a_shard_that_changed_is_refused_by_name(job: Path, copied: Path, capsys: Any) -> None:
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 1
    copied.write_bytes(content)
    assert copied.name in refused(capsys, "train", job)
    copied.unlink()
    message = refused(capsys, "train", job)
    assert copied.name in message and "missing" in message


def test_a_truncated_tar_is_refused_by_name(job: Path, copied: Path, capsys: Any) -> None:
    copied.write_bytes(copied.read_bytes()[:-15000])
    assert copied.name in refused(capsys, "train", job)
    assert copied.name in refused(capsys, "index", "mine/train-*.tar"), "and it can't be indexed away"


def test_a_run_that_exists_is_not_overwritten(job: Path, capsys: Any) -> None:
    assert main(["train", str(job), "stop_at=2step"]) == 0
    before = Path("runs/job/journal.jsonl").read_bytes()
    assert "--resume" in refused(capsys, "train", job)
    assert main(["train", str(job), "--check"]) == 2, "what launchers ask before they queue a job"
    shown = capsys.readouterr()
    assert "runs/job exists: continue it with --resume" in shown.err and "multiply-adds of the run" in shown.out
    assert Path("runs/job/journal.jsonl").read_bytes() == before


def test_a_set_smaller_than_a_batch_leaves_no_run_directory(job: Path, capsys: Any) -> None:
    assert "data.batch=2048" in refused(capsys, "train", job, "data.batch=2048", "data.micro_batch=2048")
    assert not Path("runs").exists()


def test_what_another_run_left_is_not_taken_for_ones_own(job: Path, capsys: Any) -> None:
    assert main(["train", str(job), "stop_at=2step"]) == 0
    Path("runs/job/journal.jsonl").unlink()
    assert "--resume" in refused(capsys, "train", job, "optim.lr=0.5")


def test_a_checkpoint_of_another_configuration_is_refused(job: Path, capsys: Any) -> None:
    assert main(["train", str(job), "stop_at=2step"]) == 0
    capsys.readouterr()
    message = refused(capsys, "train", job, "--resume", "optim.lr=0.5")
    assert "optim.lr: checkpoint 0.002, now 0.5" in message
    assert refused(capsys, "train", job, "--resume", "--check", "optim.lr=0.5") == message
    assert main(["train", str(job), "--resume", "--check"]) == 0
    Path("runs/job").rename("runs/moved")
    capsys.readouterr()
    assert "name=moved" in refused(capsys, "train", "runs/moved/config.yaml", "--resume")
    Path("runs/moved").rename("runs/job")
    assert main(["train", str(job), "--resume", "data.workers=1"]) == 0


def test_broken_images_keep_their_slot_and_count_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Named in the journal and on the console; the run continues, and stops above the set share."""
    monkeypatch.chdir(tmp_path)
    build_index(images.write_shards(Path("drawn"), [30, 34], classes=2, broken={5, 40}), progress=False)
    text = RECIPE.replace("DIGITS/validation", "drawn/train").replace("DIGITS", "drawn").replace("classes: 10", "classes: 2")
    Path("job.yaml").write_text(
        text.replace("batch: 64", "batch: 16").replace("{method: topk, keep: 0.7, blocks: [1, 2]}", "{}")
    )
    assert main(["train", "job.yaml", "data.broken_share=0.5"]) == 0
    found = [line for line in lineage("runs/job") if line["kind"] == "broken"]
    assert {line["id"] for line in found} == {5, 40} and all(line["reason"] for line in found)
    assert [line["images"] for line in lineage("runs/job") if line["kind"] == "eval"][-1] == 62
    assert "broken image" in capsys.readouterr().out
    message = refused(capsys, "train", "job.yaml", "name=strict", "data.broken_share=0.02")
    assert "2 of 64 images are broken, more than data.broken_share=0.02" in message
    assert lineage_end("runs/strict") == "failed"
    build_index(images.write_shards(Path("none"), [32], classes=2, broken=range(32)), progress=False)
    message = refused(capsys, "train", "job.yaml", "name=none", "data.train=none/train-*.tar")
    assert "images are broken" in message and "optim.lr" not in message, "no image at all is no matter of the learning rate"


def lineage_end(run: str) -> str:
    return [line["status"] for line in lineage(run) if line["kind"] == "end"][-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "run", "--json", "nowhere/x.json"], "--json nowhere/x.json: no such folder: {here}/nowhere; make it first"),
        (["calibrate", "run", "--density", ".5", "--json", "/proc/x.json"], "--json /proc/x.json: cannot write to /proc ("),
        (["bench", "step", "c.yaml", "--json", "there"], "--json there: is a folder; name a file in it"),
        (["eval", "run", "--plots", "file"], "--plots file: {here}/file is a file, not a folder; name another path"),
        (["eval", "run", "--plots", "file/below"], "--plots file/below: {here}/file is a file, not a folder"),
        (["export", "run", "/proc/x.safetensors"], "export /proc/x.safetensors: cannot write to /proc ("),
        (["export", "run", "file/x.onnx", "--density", "1"], "export file/x.onnx: {here}/file is a file, not a folder"),
    ],
)
def test_where_no_result_can_be_written_the_work_does_not_begin(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("file").write_text("x")
    assert message.format(here=tmp_path) in refused(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"] and Path("file").read_text() == "x"


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`report` prints its table all the same; an archive, or the run of somebody else."""
    run = write(tmp_path / "run", lines())

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(run / "report.png"))

    monkeypatch.setattr("trainer.analysis.report.picture.atomic_write", read_only)
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr()
    assert "84.38 %" in shown.out and f"no plot: {run}/report.png: Read-only file system" in shown.err
    monkeypatch.setattr("trainer.provenance.recorded_run.RecordedRun.__init__", read_only)
    message = refused(capsys, "audit", str(run))
    assert (
        f"cannot write to {run}/report.png: Read-only file system; make it writable, or copy the run to a folder that is"
        in message
    )


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("train c.yaml --epochs=3", "--epochs=3; a setting is written without dashes: epochs=3\n"),
        ("train c.yaml --lr 3", "--lr 3; a setting is written without dashes: optim.lr=VALUE\n"),
        ("bench step c.yaml --optim.lr=1", "--optim.lr=1; a setting is written without dashes: optim.lr=1\n"),
        ("train c.yaml --chek", "--chek; did you mean --check?\n"),
        ("report run --epochs=3", "--epochs=3\n"),
        ("train c.yaml -x", "-x\n"),
    ],
)
def test_an_unknown_option_names_the_setting_or_option_that_is_meant(words: str, end: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {end}")
