"""Replay and audit on real runs: a batch rebuilt is the batch that was trained on; a chain that was touched is found out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from sparsity.types import Selection
from tests.cli.test_refusals import RECIPE as DENSE
from tests.support import images
from trainer.__main__ import main
from trainer.cli.commands import COMMANDS
from trainer.data.loader.build import training_stream
from trainer.data.shards.index import build_index
from trainer.journal.reader import lineage
from trainer.provenance import kept_lists
from trainer.provenance.audit import Audit, audit
from trainer.provenance.recorded_run import RecordedRun, RecordedRunError
from trainer.provenance.replay import replay

RECIPE = DENSE.replace("epochs: 2", "epochs: 3").replace("batch: 64, micro_batch: 64", "batch: 256, micro_batch: 128").replace(
    "augment: {crop: shift, shift: 2, flip: 0.0}",
    "augment: {crop: rrc, flip: 0.5, erasing: 0.5, mixup: 0.2, cutmix: 1.0}\n"
    "examples: {method: random_epoch, removed: 0.3}",
).replace("log_every: 1step", "log_every: 3step\nevaluate: {every: 9ep}")  # fmt: skip


@pytest.fixture(scope="module")
def home(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run in three attempts: stopped in mid-epoch, stopped again, finished; dropping active."""
    folder = tmp_path_factory.mktemp("past")
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    words = ["train", str(folder / "job.yaml"), f"runs={folder / 'runs'}"]
    assert main([*words, "stop_at=2step"]) == 0
    assert main([*words, "--resume", "stop_at=7step", "log_every=2step"]) == 0
    assert main([*words, "--resume", "data.workers=1", "log_every=5step"]) == 0
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with, without its checkpoints: neither command needs them."""
    shutil.copytree(home / "runs/job", tmp_path / "job", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    return tmp_path / "job"


def audited(run: Path) -> Audit:
    return audit(RecordedRun(run), progress=False)


def changed(run: Path, change: Any) -> None:
    """Rewrite the journal's lines; `change` alters a line in place, or returns False to drop it."""
    path = run / "journal.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if change(line) is not False))


def test_the_audit_of_a_resumed_run_is_equal_and_counts_what_was_shown(run: Path, capsys: Any, tmp_path: Path) -> None:
    assert main(["audit", str(run), "--json", str(tmp_path / "audit.json")]) == 0
    message = capsys.readouterr().out
    reported = json.loads((tmp_path / "audit.json").read_text())
    assert reported["equal"] and "equal" in message and reported["steps"] == 9 and len(reported["attempts"]) == 3
    steps = [line for line in lineage(run) if line["kind"] == "step"]
    assert reported["chain"] == steps[-1]["chain"] and reported["marks"] == len(steps) and reported["differing"] == 0
    for epoch in reported["epochs"]:
        assert epoch["whole"] and epoch["steps"] == 3 and epoch["more"] == 0
        assert epoch["once"] == 3 * 256 and epoch["once"] + epoch["leftover"] == epoch["kept"] == 1438 - round(0.3 * 1438)
    assert sum(reported["presentations"].values()) == 1438
    assert sum(int(n) * examples for n, examples in reported["presentations"].items()) == 9 * 256
    assert len(list((run / "kept").iterdir())) == len({epoch["list"] for epoch in reported["epochs"]}) == 3, (
        "one list per change"
    )


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_replayed_batch_is_the_one_that_was_trained_on(run: Path, step: int) -> None:
    past = RecordedRun(run)
    replayed, stretch = replay(past, step), past.segment(step)
    stream = training_stream(past.index, past.config, 0, 1)
    selection = past.selection(stretch.kept)
    number = replayed.facts["batch"]
    seen = next(iter(stream.epoch(stretch.epoch, selection, number)))
    assert (stretch.epoch, number) == divmod(step - 1, 3)
    for name in ("images", "labels", "ids", "copies", "weights", "flip", "erase", "rng_keys"):
        assert torch.equal(getattr(replayed.batch, name), getattr(seen, name)), name
    assert replayed.confirmed and all(row["key"].startswith("digit_") for row in replayed.rows)
    unlike = replayed.images != replayed.batch.images
    assert unlike.any() and replayed.facts["mix"]["lam"] < 1, "flip, erasing and mixing are in the pictures"


def test_the_pictures_are_the_host_s_where_the_device_changes_nothing(run: Path) -> None:
    """No flip, no erasing, no mixing: normalising and back is exact."""
    past = RecordedRun(run, ["augment.flip=0", "augment.erasing=0", "augment.mixup=0", "augment.cutmix=0"])
    replayed = replay(past, 5)
    assert torch.equal(replayed.images, replayed.batch.images)
    other = replay(RecordedRun(run, ["augment.flip=1", "augment.erasing=0", "augment.mixup=0", "augment.cutmix=0"]), 5)
    assert torch.equal(other.images, other.batch.images.flip(-1))


def test_a_run_that_decoded_on_the_device_is_replayed_on_the_cpu_and_that_is_reported(run: Path) -> None:
    plain, device = (replay(RecordedRun(run, words), 5) for words in ([], ["data.decode_on=device"]))
    assert "decoded by the CPU" in device.text() and device.facts["decode_on"] == "device"
    assert "decode" not in plain.text() and torch.equal(plain.images, device.images)


def test_replay_writes_sheet_table_and_pictures(run: Path, capsys: Any, tmp_path: Path) -> None:
    assert main(["replay", str(run), "--step", "4", "--out", str(tmp_path / "out")]) == 0
    message = " ".join(capsys.readouterr().out.split())  # a title with a long path is wrapped
    assert "epoch 1, batch 0 of 3" in message and "confirms" in message
    reported = json.loads((tmp_path / "out/batch.json").read_text())
    assert len(reported["rows"]) == 256 and reported["confirmed"] is True
    top, left, height, width = reported["rows"][0]["crop"]
    assert 0 <= top <= top + height <= 8 and 0 <= left <= left + width <= 8, "a box in the 8 x 8 digit"
    sheet = np.asarray(PIL.Image.open(tmp_path / "out/sheet-00.png"))
    pictures = np.load(tmp_path / "out/images.npz")["images"]
    assert (sheet[34 : 34 + 32, 34 : 34 + 32] == pictures[17].transpose(1, 2, 0)).all()
    assert len((tmp_path / "out/rows.csv").read_text().splitlines()) == 257


def test_a_step_that_was_never_made_is_refused(run: Path, capsys: Any) -> None:
    for step in ("0", "10"):
        assert main(["replay", str(run), "--step", step]) == 2
        assert "steps 1 to 9" in capsys.readouterr().err


def test_a_changed_chain_is_found_where_it_was_changed(run: Path, capsys: Any) -> None:
    def forge(line: dict[str, Any]) -> None:
        if line["kind"] == "step" and line["step"] == 6:
            line["chain"] = "0" * 32

    changed(run, forge)
    found = audited(run)
    assert not found.equal and found.differing == 2, "its own window, and the one that begins at it"
    assert (
        found.first_difference is not None
        and found.first_difference["steps"] == [5, 6]
        and found.first_difference["attempt"] == 1
    )
    assert main(["audit", str(run)]) == 1 and "steps 5 to 6" in capsys.readouterr().out
    assert replay(RecordedRun(run), 6).confirmed is False and replay(RecordedRun(run), 2).confirmed


def test_a_changed_kept_list_is_found(run: Path) -> None:
    name = audited(run).epochs[1]["list"]
    path = kept_lists.path_of(run, name)
    with np.load(path) as arrays:
        keep = arrays["keep"].copy()
    keep[3] ^= 1
    np.savez(path, keep=keep)
    assert any("was changed" in problem for problem in audited(run).problems)
    path.write_bytes(path.read_bytes()[:50])
    assert any("can't be read" in problem for problem in audited(run).problems)
    path.unlink()
    assert any("missing" in problem and name in problem for problem in audited(run).problems)

    forged = kept_lists.write(run, Selection(keep, 0, None, {"hash": kept_lists.selection_hash(keep, None)}))

    def point(line: dict[str, Any]) -> None:
        if line["kind"] == "epoch" and line["facts"]["hash"] == name:
            line["facts"]["hash"] = forged.stem

    changed(run, point)
    found = audited(run)  # a list that fits its name and the journal: the hash chain differs
    assert found.first_difference is not None and found.first_difference["epoch"] == 1


def test_lost_lines_and_another_configuration_are_found(run: Path, digits: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    found = audited(run)
    assert any("seed=0" in problem and "seed" in problem for problem in found.problems) and found.differing == found.marks
    (run / "config.yaml").write_text(text)
    changed(run, lambda line: line["kind"] != "epoch" or line["epoch"] != 1)
    with pytest.raises(RecordedRunError, match="epoch 0 has 3 batches, but 6"):
        RecordedRun(run)
    changed(run, lambda line: line["attempt"] != 1)
    with pytest.raises(RecordedRunError, match="after step 2 it must continue with epoch 0, batch 2"):
        RecordedRun(run)


def test_other_shards_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    pattern = images.write_shards(tmp_path / "other", [20])
    build_index(pattern, progress=False)
    assert main(["audit", str(run), f"data.train={pattern}"]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_lost_steps_of_a_killed_attempt_do_not_count(run: Path) -> None:
    """Steps behind the point where a later attempt went on, with another chain, change nothing."""
    before = audited(run)
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    second = next(i for i, text in enumerate(lines) if json.loads(text)["attempt"] == 1)
    vain = next(json.loads(text) for text in lines if json.loads(text)["kind"] == "step")
    lines.insert(second, json.dumps(vain | {"step": 3, "batch": 0, "epoch": 1, "chain": "f" * 32}) + "\n")
    lines.insert(second, json.dumps({"kind": "broken", "attempt": 0, "step": 3, "id": 7, "reason": "-", "time": 0}) + "\n")
    path.write_text("".join(lines))
    assert audited(run).facts() == before.facts() and before.equal


def test_an_attempt_that_was_killed_before_its_resume_line_cuts_nothing(run: Path) -> None:
    before = audited(run)
    path = run / "journal.jsonl"
    found = [json.loads(text) for text in path.read_text().splitlines()]
    second = next(i for i, line in enumerate(found) if line["attempt"] == 1)
    found = [line | {"attempt": line["attempt"] + 1} if i >= second else line for i, line in enumerate(found)]
    start = next(line for line in found if line["kind"] == "start" and line["attempt"] == 2)
    found.insert(second, start | {"attempt": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    after = audited(run)
    assert after.equal and after.epochs == before.epochs


def test_broken_images_and_copies_are_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_index(images.write_shards(Path("drawn"), [30, 34], classes=2, broken={5, 40}), progress=False)
    text = DENSE.replace("DIGITS/validation", "drawn/train").replace("DIGITS", "drawn").replace("classes: 10", "classes: 2")
    text = text.replace("batch: 64", "batch: 16").replace("log_every: 1step", "log_every: 7step\nevaluate: {every: 9ep}")
    Path("job.yaml").write_text(text)
    words = ["data.broken_share=0.5", "data.repeats=2", "examples.method=infobatch", "examples.removed=0.5", "epochs=4"]
    assert main(["train", "job.yaml", *words, "stop_at=10step"]) == 0
    assert main(["train", "job.yaml", *words, "--resume", "stop_at=10step"]) == 0
    assert [line["step"] for line in lineage("runs/job") if line["kind"] == "step"][-1] == 10, "no step more than was set"
    assert main(["train", "job.yaml", *words, "--resume"]) == 0
    found = audited(Path("runs/job"))
    assert found.equal, found.problems
    assert found.broken.keys() <= {5, 40} and sum(epoch["broken"] for epoch in found.epochs) > 0
    assert all(epoch["once"] == 0 and epoch["more"] > 0 for epoch in found.epochs), "each twice in one batch"
    step = next(line["step"] for line in lineage("runs/job") if line["kind"] == "broken")
    past = RecordedRun("runs/job")
    shown = [replay(past, s) for s in range(max(1, step - 6), step + 1)]
    assert any(replayed.batch.broken for replayed in shown) and all(replayed.confirmed for replayed in shown)

    changed(Path("runs/job"), lambda line: line["kind"] != "broken")
    assert not audited(Path("runs/job")).equal, "a broken image that is not in the journal is a difference"


def test_the_list_of_an_epoch_is_written_out_with_its_keep_rates(run: Path, tmp_path: Path, capsys: Any) -> None:
    out, facts = tmp_path / "lists", tmp_path / "kept.json"
    assert main(["kept", str(run), "--epoch", "1", "--out", str(out), "--json", str(facts)]) == 0
    message = capsys.readouterr().out
    with open(out / "epoch-0001-kept.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    past = RecordedRun(run)
    keep = np.unpackbits(past.selection(past.segment(4).kept).keep, count=1438, bitorder="little").astype(bool)
    ids = [int(row["id"]) for row in rows]
    assert ids == np.flatnonzero(keep).tolist() and len(ids) == 1438 - round(0.3 * 1438) and f"{len(ids):,} examples" in message
    assert all(row["key"] == past.index.key(int(row["id"])) and row["weight"] == "1" for row in rows[::50])
    reported = json.loads(facts.read_text())
    assert (
        sum(one["kept"] for one in reported["classes"]) == len(ids)
        and sum(one["examples"] for one in reported["classes"]) == 1438
    )
    for one in reported["classes"]:
        of = past.index.labels == one["label"]
        assert one["kept"] == keep[of].sum() and one["keep_ratio"] == pytest.approx(keep[of].mean())
    assert main(["kept", str(run), "--out", str(out)]) == 0 and (out / "epoch-0002-kept.csv").is_file(), "the newest"
    assert main(["kept", str(run), "--epoch", "9"]) != 0 and "--epoch 9" in capsys.readouterr().err


def test_output_that_is_closed_before_its_end_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`trilevel kept RUN | head -1`."""
    monkeypatch.setitem(COMMANDS, "kept", lambda _: print("a list\n" * 9999))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert main(["kept", "run"]) == 141
    assert capsys.readouterr().err == ""

    def away(_: Any) -> None:
        raise BrokenPipeError("a connection's")

    monkeypatch.setitem(COMMANDS, "kept", away)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as read, os.fdopen(reading), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", read)
        with pytest.raises(BrokenPipeError, match="a connection's"):
            main(["kept", "run"])
