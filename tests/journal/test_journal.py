"""The journal: whole lines after a kill, one writer, the surviving lineage, a full disk, the cost of a line."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config.load import parse
from trainer.journal import writer
from trainer.journal.file import JournalError
from trainer.journal.reader import FILE, last_attempt, lineage, read, read_from
from trainer.journal.writer import Journal
from trainer.run.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_lines_come_back_as_written(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.write("step", step=1, loss=np.float32(0.5), lr=torch.tensor(0.25), ids=np.arange(3), path=tmp_path, none=None)
        journal.write("step", step=2, loss=math.nan, grad_norm=math.inf, low=-math.inf)
    one, two = read(tmp_path)
    assert (one["kind"], one["attempt"], one["loss"], one["lr"], one["ids"], one["path"]) == (
        "step",
        0,
        0.5,
        0.25,
        [0, 1, 2],
        str(tmp_path),
    )
    assert one["none"] is None and abs(one["time"] - time.time()) < 60
    assert math.isnan(two["loss"]) and two["grad_norm"] == math.inf and two["low"] == -math.inf
    for raw in (tmp_path / FILE).read_text().splitlines():
        json.loads(raw, parse_constant=pytest.fail)  # strict JSON: any reader can read it


def test_torn_last_line_is_cut_off(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.write("start", world=1)
        journal.write("step", step=1)
    whole = (tmp_path / FILE).read_bytes()
    for torn in (b'{"kind": "step", "st', b"\xff\x00", b"x" * 200_000):
        (tmp_path / FILE).write_bytes(whole + torn)
        assert [line["kind"] for line in read(tmp_path)] == ["start", "step"]
        Journal(tmp_path).close()
        assert (tmp_path / FILE).read_bytes() == whole
    with Journal(tmp_path) as journal:
        journal.write("step", step=2)
    assert [line.get("step") for line in read(tmp_path)] == [None, 1, 2]


def test_unreadable_line_in_the_middle_is_named_and_left_out(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.write("step", step=1)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"\x00\x00\x00\n[1]\n")
    with pytest.warns(UserWarning, match="not a journal line"):
        with Journal(tmp_path) as journal:
            journal.write("step", step=2)
        assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_kill_in_the_middle_of_writing_loses_no_finished_line(tmp_path: Path):
    code = """
import sys
from trainer.journal.writer import Journal
with Journal(sys.argv[1]) as journal:
    step = 0
    while True:
        step += 1
        journal.write("step", step=step, filler="y" * 3000)
        print(step, flush=True)
"""
    writer = python(code, tmp_path)
    assert writer.stdout
    reported = 0
    while reported < 200:
        reported = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    reported = max([reported] + [int(n) for n in writer.stdout.read().split("\n")[:-1]])
    writer.wait()
    with Journal(tmp_path) as journal:
        assert journal.attempt == 1
    steps = [line["step"] for line in read(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and reported <= len(steps) <= reported + 1


def test_one_writer_and_a_forked_child_does_not_keep_the_lock(tmp_path: Path):
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="another process is writing it"):
        Journal(tmp_path)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:  # lives on when the writer is gone, as a data worker may
        os.write(there, b"up")
        time.sleep(20)
        os._exit(0)
    try:
        os.read(here, 2)
        journal.close()
        Journal(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_resume_of_a_living_run_leaves_its_files_alone(tmp_path: Path):
    sections = {
        "name": "x",
        "runs": str(tmp_path),
        "model": {"name": "deit_tiny_patch16_224"},
        "data": {"train": "a", "validation": "b"},
    }
    config = parse(sections | {"log_every": "7step"})
    engine: Any = SimpleNamespace(is_main=True, broadcast_object=lambda item: item)
    with Journal(tmp_path / "x"):
        (tmp_path / "x" / "config.yaml").write_text("of the living one")
        with pytest.raises(JournalError, match="another process is writing it"):
            Recorder(config, engine, resume=True)
        assert (tmp_path / "x" / "config.yaml").read_text() == "of the living one"


def test_attempts_count_up_and_none_is_used_twice(tmp_path: Path):
    assert last_attempt(tmp_path) == -1
    for attempt in range(3):
        with Journal(tmp_path) as journal:
            assert journal.attempt == attempt
            journal.write("start")
    with pytest.raises(JournalError, match="attempt 1 exists already"):
        Journal(tmp_path, attempt=1)
    with Journal(tmp_path, attempt=7) as journal:  # the failed one left no lock behind
        journal.write("start")
    assert last_attempt(tmp_path) == 7


def test_the_follower_continues_after_the_last_whole_line(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write("step", step=1)
    journal.write("step", step=2)
    (first, _), (second, line) = read_from(tmp_path, 0)
    assert (
        line["step"] == 2 and [o for o, _ in read_from(tmp_path, first)] == [second] and not list(read_from(tmp_path, second))
    )
    journal.write("step", step=3)
    assert [line["step"] for _, line in read_from(tmp_path / FILE, second)] == [3]
    journal.close()


def write_attempts(directory: Path, attempts: list[list[tuple[str, dict]]]) -> None:
    for lines in attempts:
        with Journal(directory) as journal:
            for kind, fields in lines:
                journal.write(kind, **fields)


def test_lineage_counts_every_step_once_over_kills(tmp_path: Path):
    def steps(first: int, behind: int) -> list[tuple[str, dict]]:
        return [("step", {"step": s, "epoch": s // 10}) for s in range(first, behind)]

    def evaluated(step: int, ema: bool = False) -> tuple[str, dict]:
        return "eval", {"step": step, "ema": ema}

    write_attempts(
        tmp_path,
        [
            [("start", {}), ("epoch", {"epoch": 0}), *steps(1, 8), ("checkpoint", {"step": 7}), evaluated(7),
             *steps(8, 13), evaluated(12), ("broken", {"id": 4}), ("broken", {"id": 5, "step": 3})],
            [("start", {}), ("resume", {"step": 7}), ("epoch", {"epoch": 0}), evaluated(7), evaluated(7, ema=True),
             *steps(8, 15), ("checkpoint", {"step": 14}), *steps(15, 17)],
            [("start", {})],  # died before it did anything
            [("start", {}), ("resume", {"step": 9}), *steps(10, 20), ("end", {"status": "finished"})],  # an older checkpoint
        ],
    )  # fmt: skip
    lines = list(lineage(tmp_path))
    kept = [(line["step"], line["attempt"]) for line in lines if line["kind"] == "step"]
    assert [s for s, _ in kept] == list(range(1, 20))
    assert [a for _, a in kept] == [0] * 7 + [1] * 2 + [3] * 10

    def of(kind: str) -> list[dict]:
        return [line for line in lines if line["kind"] == kind]

    assert [(line["step"], line["ema"], line["attempt"]) for line in of("eval")] == [(7, False, 0), (7, True, 1)]
    assert [line["attempt"] for line in of("epoch")] == [0] and [line["attempt"] for line in of("start")] == [0, 1, 2, 3]
    assert [line["id"] for line in of("broken")] == [5]  # the other stays in its attempt's place, after the cut
    assert [line["step"] for line in of("checkpoint")] == [7] and len(of("end")) == 1
    assert len(list(read(tmp_path))) > len(lines)  # nothing is deleted


def test_lineage_of_a_run_begun_again_without_a_checkpoint(tmp_path: Path):
    begin = [("start", {}), ("epoch", {"epoch": 0, "step": 0}), ("step", {"step": 1}), ("step", {"step": 2})]
    write_attempts(tmp_path, [begin, begin])
    assert [(line["step"], line["attempt"]) for line in lineage(tmp_path) if line["kind"] == "step"] == [(1, 1), (2, 1)]


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A limit on the size of files simulates the full disk: a write in the middle of a line fails in the same way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path)
    journal.write("step", step=1)
    size = (tmp_path / FILE).stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        journal.write("step", step=2)
        journal.write("end", step=3)
        assert (tmp_path / FILE).stat().st_size == size  # no half line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("held in memory") == 1
    journal.write("step", step=4)
    journal.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM, errno.ESTALE])
def test_a_journal_that_can_not_be_written_any_more_ends_the_run_by_its_name(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that becomes read-only in mid-run, `chattr +i`: the error used to name no file."""
    for name in ("write", "fsync"):
        folder = tmp_path / name
        journal = Journal(folder)
        journal.write("step", step=1)

        def refused(*_: Any, number: int = number) -> Any:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(f"trainer.journal.writer.os.{name}", refused)
            with pytest.raises(JournalError, match=rf"{folder}/{FILE}: {os.strerror(number)}: .* --resume"):
                journal.write("end", step=2)
        journal._pending = b""
        journal.close()
        assert [line["step"] for line in read(folder)] == ([1] if name == "write" else [1, 2])


def test_a_full_disk_costs_no_line_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lines of different length before it, of this writer and of the one before: the file is cut where its last whole line ends."""
    with Journal(tmp_path) as journal:
        journal.write("start", text="x" * 300)
        journal.write("step", step=1)
    journal, real = Journal(tmp_path), os.write
    journal.write("step", step=2, text="y" * 200)
    journal.write("step", step=3)
    size = (tmp_path / FILE).stat().st_size

    def full(file: int, data: bytes) -> int:
        real(file, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (4, 5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            journal.write("step", step=step)
        assert (tmp_path / FILE).stat().st_size == size
    journal.write("step", step=6)
    assert [line.get("step") for line in read(tmp_path)] == [None, 1, 2, 3, 4, 5, 6]
    journal.close()


def test_lines_that_wait_for_a_full_disk_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_file: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "PENDING_BYTES", 1000)
    journal, real = Journal(tmp_path), os.write
    monkeypatch.setattr(os, "write", full)
    journal.write("message", text="x" * 850)
    with pytest.raises(JournalError, match=r"No space left on device for 1\d\d\d bytes "):
        journal.write("message", text="x" * 100)
    monkeypatch.setattr(os, "write", real)
    journal.close()


def test_a_forked_worker_writes_no_line_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_file: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal, real = Journal(tmp_path), os.write
    monkeypatch.setattr(os, "write", full)
    journal.write("step", step=1)
    monkeypatch.setattr(os, "write", real)  # space is free again when the worker starts
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    journal.write("step", step=2)
    journal.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_lines_that_a_resume_builds_on_are_synced_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    with Journal(tmp_path) as journal:
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or real(file))
        counts = {}
        for kind in ("start", "resume", "epoch", "step", "eval", "checkpoint", "message", "end"):
            before = len(synced)
            journal.write(kind, step=1)
            counts[kind] = len(synced) - before
    assert {kind for kind, count in counts.items() if count} == {"start", "resume", "checkpoint", "end"}
    assert set(counts.values()) == {0, 1}


def test_lines_lost_to_a_full_disk_at_the_end_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        journal.write("step", step=2)
        journal.write("end", step=3)
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "its last 2 line(s) are lost" in capsys.readouterr().err and list(read(tmp_path)) == []


def test_a_line_costs_microseconds_and_memory_stays(tmp_path: Path):
    with Journal(tmp_path) as journal:
        took = []
        for step in range(3000):
            began = time.thread_time()  # of the processor: what else the machine does is not counted
            journal.write("step", step=step, loss=2.3, **{f"metric_{i}": i / 7 for i in range(40)})
            took.append(time.thread_time() - began)
        assert len(journal._pending) == 0
    assert np.median(took) < 2e-3  # .1 ms measured; `trilevel bench journal` measures it


def test_missing_journal_is_named(tmp_path: Path):
    with pytest.raises(JournalError, match=r"no such journal.*runs/NAME"):
        list(read(tmp_path / "nowhere"))


def test_a_disk_that_refuses_to_be_sure_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A full quota on NFS is reported when the file is synchronised, not when it is written."""

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with Journal(tmp_path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            journal.write("start")
            journal.write("checkpoint", step=1)
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EBADF, "our mistake")))
            with pytest.raises(OSError, match="our mistake"):
                journal.sync()
        journal.write("checkpoint", step=2)
    assert capsys.readouterr().err.count("may now lose the last lines") == 1
    assert [line["kind"] for line in read(tmp_path)] == ["start", "checkpoint", "checkpoint"]


@pytest.mark.parametrize("how", ["directory renamed", "directory removed", "file replaced"])
def test_a_run_directory_that_is_taken_away_is_noticed_before_the_next_checkpoint(how: str, tmp_path: Path) -> None:
    """Such a run trained on to its end into a file without a name."""
    directory = tmp_path / "runs" / "name"
    with Journal(directory) as journal:
        journal.write("start")
        journal.sync()
        if how == "directory renamed":
            directory.rename(tmp_path / "runs" / "other")
        elif how == "directory removed":
            shutil.rmtree(directory)
        else:
            (directory / FILE).rename(directory / "old")
            (directory / FILE).touch()
        journal.write("step", step=1)
        with pytest.raises(JournalError, match=r"removed, renamed or replaced .* --resume"):
            journal.sync()
