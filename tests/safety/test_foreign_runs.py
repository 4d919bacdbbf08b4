"""Files of other people's runs, shards and configurations: found by a review that looked for what the first one had not tried."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.job import Job, LaunchError
from launch.restarts import run_directory
from launch.run_files import written_since
from launch.sweep import about
from tests.support import journals
from trainer.checkpoint import directory, save_load
from trainer.config.credentials import without_credentials
from trainer.config.errors import ConfigError, TrilevelError
from trainer.config.load import load, parse
from trainer.config.strict_yaml import load_yaml
from trainer.data.errors import DataError
from trainer.data.shards.tar import members
from trainer.journal.lines import wrong
from trainer.model import thresholds
from trainer.preflight import first_config
from trainer.storage.disk import Disk
from trainer.tracking import address, upload
from trainer.tracking.metrics import metrics


@pytest.mark.parametrize(
    ("kind", "name"), [(tarfile.DIRTYPE, "a directory"), (tarfile.LNKTYPE, "a hard link"), (tarfile.FIFOTYPE, "a FIFO")]
)
def test_a_tar_header_that_hides_the_members_after_it_is_refused(kind: bytes, name: str, tmp_path: Path) -> None:
    """GNU tar and Python list what follows; by its length it would be skipped, a whole example without a word."""
    out = io.BytesIO()

    def add(member: str, data: bytes) -> None:
        info = tarfile.TarInfo(member)
        info.size = len(data)
        out.write(info.tobuf() + data + bytes(-len(data) % 512))

    add("a.png", b"1" * 600)
    odd = tarfile.TarInfo("x")
    odd.type, odd.size = kind, 3 * 512
    out.write(odd.tobuf())
    add("b.png", b"2" * 600)
    (tmp_path / "x.tar").write_bytes(out.getvalue() + bytes(1024))
    with pytest.raises(DataError, match=rf"'x' at byte 1536 is {name} with a length of 1536 bytes; make the tar again"):
        list(members(tmp_path / "x.tar"))


def bomb(levels: int) -> str:
    text = "a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}\n"
    return text + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, levels))


def test_merges_of_merges_are_counted_before_they_are_made(tmp_path: Path) -> None:
    """469 bytes took 86 s."""
    assert load_yaml(bomb(2))["a1"]["k9"] == 1, "a few are fine"
    began = time.monotonic()
    (tmp_path / "c.yaml").write_text(bomb(12))
    with pytest.raises(yaml.YAMLError, match=r"values once its aliases \(\*name\) are expanded, must be <= 100,000"):
        load_yaml(bomb(12))
    with pytest.raises(ConfigError, match="must be <= 100,000"):
        load(tmp_path / "c.yaml")
    with pytest.raises(LaunchError, match="must be <= 100,000"):
        about(str(tmp_path / "c.yaml"), [])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["yes", "on", "0x10", "1_000", "plain", '"quoted"', "a # c"])
def test_the_launcher_reads_the_name_of_a_run_as_the_trainer_does(name: str, tmp_path: Path) -> None:
    raw = {"data": {"train": "a", "validation": "b"}, "model": {"name": "deit_tiny_patch16_224"}}
    (tmp_path / "c.yaml").write_text(f"name: {name}\n" + yaml.safe_dump(raw))
    path = str(tmp_path / "c.yaml")
    assert run_directory(Job(path, (), resume=True)) == load(path).directory()
    assert run_directory(Job(path, (f"name={name}",), resume=True)) == load(path, [f"name={name}"]).directory()


@pytest.mark.parametrize("last", ['{"kind": "End"}', "[1]", '{"end": {}}', "1e999", "{"])
def test_an_odd_last_line_of_a_journal_is_no_cause(last: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(last + "\n")
    assert written_since(tmp_path, 0) == (False, "", None)


def journal(folder: Path, **tracking: Any) -> Path:
    folder.mkdir()
    start, *rest = journals.lines()
    start = start | {"config": start["config"] | {"tracking": tracking}}
    return journals.write(folder, [start, *rest])


def test_links_in_a_run_are_not_uploaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    run = journal(tmp_path / "run")
    (run / "traces").mkdir()
    (run / "traces" / "t.json").symlink_to(secret)
    (run / "report.md").symlink_to(secret)
    (run / "plan.md").write_text("a plan")
    uploader = upload.JournalUploader(run)
    names = {name for _, name, _ in uploader._fresh(first=False)}
    assert {"plan.md", "journal.jsonl"} <= names and not names & {"report.md", "traces/t.json"}
    uploader.fresh_bytes()
    text = capsys.readouterr().out
    assert text.count("traces/t.json: not uploaded, because it is a link") == text.count("report.md: not uploaded") == 1
    (run / "traces" / "t.json").unlink()
    (run / "traces").rmdir()
    (run / "traces").symlink_to(tmp_path)
    assert not {name for _, name, _ in upload.JournalUploader(run)._fresh(first=False) if "id_rsa" in name}


@pytest.mark.parametrize("source", ["journal", "mlflow.json"])
def test_credentials_go_to_a_server_that_the_environment_names(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = "http://elsewhere:5000"
    run = journal(tmp_path / "run", **({"uri": theirs} if source == "journal" else {}))
    if source == "mlflow.json":
        (run / "mlflow.json").write_text(json.dumps({"uri": theirs}))
    for name in (*address.CREDENTIALS, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    address.refuse_unnamed(
        upload.where(run, theirs if source == "journal" else None), run, address.credential()
    )  # nothing to send
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    to = upload.where(run, theirs if source == "journal" else None)
    with pytest.raises(
        TrilevelError, match=f"MLFLOW_TRACKING_URI={theirs} trilevel sync .*, else unset MLFLOW_TRACKING_PASSWORD"
    ):
        address.refuse_unnamed(to, run, address.credential())
    from trainer.tracking.sync import sync

    with pytest.raises(TrilevelError, match="its files name the server"):
        sync(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:word@mine:5000")
    if source == "journal":
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")  # the address of the environment has one
    if source == "journal":
        with pytest.raises(TrilevelError, match="its files name the server"):
            address.refuse_unnamed(to, run, address.credential())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs + "/")
    address.refuse_unnamed(to, run, address.credential())
    assert without_credentials(theirs) == theirs


def test_checkpoints_of_newer_versions_stay_and_incomplete_ones_are_passed_over(tmp_path: Path) -> None:
    config = parse(
        {"name": "x", "model": {"name": "deit_tiny_patch16_224"}, "data": {"train": "a", "validation": "b"},
         "checkpoint": {"keep": 1, "best": False}}
    )  # fmt: skip
    for name, about_it in {
        "step-00000001": {"format": 3},
        "step-00000002": {"format": 1, "bytes": {}},
        "step-00000003": {"format": True, "bytes": {}},
        "step-00000005": {"format": 1, "bytes": {}, "state": {"step": "9", "epoch": 0}, "config": {}, "fingerprint": ""},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps(about_it))
    parts: Any = {"weights": {}, "optimizer": {}, "ema": {}, "examples": {}, "selection": None}
    for step in (4, 5, 6):
        save_load.save_checkpoint(tmp_path, save_load.TrainState(step=step), config, "shards", **parts)
    assert set(directory.by_age(Disk().names(tmp_path))) == {"step-00000001", "step-00000006"}
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "state.json").write_text(json.dumps({"format": 1, "bytes": {}}))
    (tmp_path / "latest").write_text("step-00000007")
    found = save_load.newest(tmp_path)
    assert found.path == tmp_path / "step-00000006" and "has no usable state" in found.damaged[0]
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("latest")
    assert save_load.newest(tmp_path).path == tmp_path / "step-00000006"


@pytest.mark.parametrize(
    "text", ["/data/my #data/train-*.tar", "a: b", "x\ny: [", "~", "{a}", "tab\there", "a\u2028runs: hacked", "- d"]
)
def test_init_quotes_what_yaml_would_read_otherwise(text: str) -> None:
    assert load_yaml(f"train: {first_config._value(text)}\n") == {"train": text}
    assert len(load_yaml(f"# {first_config._one_line(text)}\na: 1\n")) == 1
    assert first_config._value("/data/imagenet/train-{000..123}.tar") == "/data/imagenet/train-{000..123}.tar", (
        "plain where it can be"
    )


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b'{"weights": "a", "block": Infinity, "importance": "cls", "least": 1, "images": 1, "by_density": {}}',
     b'{"weights": "a", "block": 1, "importance": "cls", "least": -5, "images": 1, "by_density": {}}',
     b'{"weights": "a", "block": 1, "importance": "cls", "least": 1, "images": 1, "by_density": {"nan": [0.5, 0.5]}}'],
)  # fmt: skip
def test_thresholds_of_a_foreign_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "thresholds.json").write_bytes(content)
    with pytest.raises(ConfigError, match="run trilevel calibrate again"):
        thresholds.read(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        thresholds.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "step", "images": float("nan")},
        {"kind": "end", "spent": {"control": {}}},
        {"kind": "end", "spent": {"training": float("nan")}},
        {"kind": "step", "spent": {"training": "1"}},
        {"kind": "start", "config": {"tracking": [1]}},
        {"kind": "start", "config": {"tracking": {"tags": "a"}}},
    ],
)
def test_lines_with_numbers_that_cannot_be_added_are_damaged(line: dict[str, Any]) -> None:
    assert wrong({"time": 1.0, "attempt": 0, **line}) is not None


def test_an_integer_of_any_length_is_no_metric() -> None:
    line = {"kind": "epoch", "time": 1.0, "step": 3, "epoch": 1, "facts": {"huge": 10**400, "kept": 3.0}}
    assert not any("huge" in metric.key for metric in metrics(line, 3))
