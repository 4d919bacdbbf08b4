"""A rank that stops without exiting: the others end within `engine.timeout`, and name it and its place."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import environment, free_port, lines, wait_for
from tests.faults import live_job
from tests.laws.test_main_job import RECIPE
from trainer.engine.errors import LATE
from trainer.engine.late_ranks import Beat, describe

LIMIT = 6  # s
SETTINGS = ("epochs=400", f"engine.timeout={LIMIT}", "evaluate.every=0ep", "control=0")


@contextlib.contextmanager
def two_ranks(folder: Path, *words: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks without an agent, which would kill the stopped one only after 30 s. Their output: rank-N.txt in the folder."""
    with processes(folder, "-m", "trainer", "train", str(folder / "job.yaml"), *SETTINGS, *words) as ranks:
        yield ranks


@contextlib.contextmanager
def processes(folder: Path, *command: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes of this Python with the environment of ranks."""
    port, ranks = str(free_port()), []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = environment(**place, MASTER_PORT=port, TRILEVEL_EXIT_FILE=str(folder / f"exit-{rank}"))
        with (folder / f"rank-{rank}.txt").open("wb") as out:
            ranks.append(
                subprocess.Popen([sys.executable, *command], cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def stopped(digits: Path, folder: Path, rank: int, *words: str) -> tuple[int, float, str]:
    """Stop one of two ranks after step 3: exit code and output of the other, and the seconds until it ended."""
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    journal = folder / "runs" / "job" / "journal.jsonl"
    with two_ranks(folder, *words) as ranks:
        wait_for(lambda: ranks[0].poll() is not None or (journal.is_file() and '"step":3,' in journal.read_text()), 200)
        assert ranks[0].poll() is None, (folder / "rank-0.txt").read_text()
        os.kill(ranks[rank].pid, signal.SIGSTOP)
        began, other = time.monotonic(), 1 - rank
        code = ranks[other].wait(100)
        return code, time.monotonic() - began, (folder / f"rank-{other}.txt").read_text()


@pytest.mark.dist
def test_a_stopped_rank_is_named_with_its_place_and_the_run_ends(digits: Path, tmp_path: Path) -> None:
    code, seconds, output = stopped(digits, tmp_path, 1, "engine.kind=ddp")
    assert code == LATE and (tmp_path / "exit-0").read_text() == str(LATE)
    assert seconds < LIMIT + 30
    run = tmp_path / "runs" / "job"
    (end,) = lines(run, "end")
    step = lines(run, "step")[-1]["step"]
    assert end["status"] == "failed" and end["step"] == step
    assert end["reason"].startswith("rank 0: rank 1 on ") and "no heartbeat any more: process stopped" in end["reason"]
    assert f"engine.timeout={LIMIT} s have passed" in end["reason"] and "Continue with --resume" in end["reason"]
    assert f", step {step}" in end["reason"] or f", step {step + 1}" in end["reason"]
    assert f"trilevel: {end['reason']}" in output
    log = (run / "logs" / "rank-0.txt").read_text()
    assert "did not arrive" in log and 'File "' in log and "in train" in log, "the stacks of all threads"


@pytest.mark.dist
@pytest.mark.slow
def test_a_stopped_rank_0_that_holds_the_store_ends_the_others_too(digits: Path, tmp_path: Path) -> None:
    code, seconds, output = stopped(digits, tmp_path, 0)
    assert code == LATE and seconds < LIMIT + 60, output
    assert "the store of the process group does not answer" in output


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_stops_while_it_imports_is_named_before_the_process_group_exists(digits: Path, tmp_path: Path) -> None:
    """It used to take half an hour and end with torch's "wait timeout after 1800000ms, keys: /default_pg/0//cpu//0/1"."""
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    with two_ranks(tmp_path, "engine.kind=ddp", "engine.start_timeout=15") as ranks:
        time.sleep(0.5)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(120) == LATE
    output = (tmp_path / "rank-0.txt").read_text()
    assert "rank 1 (no heartbeat ever: not started, still importing, stopped, or its node lost) did not arrive" in output
    assert "engine.start_timeout=15 s have passed" in output and (tmp_path / "exit-0").read_text() == str(LATE)


AT_END = """
import os, signal
from trainer.config.run_config import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine.engine import Engine
engine = Engine(EngineConfig(kind="ddp", timeout=3), BatchSplit(2, 1, 2))
engine.heartbeat.clock.stepped = True
if engine.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
engine.meet_at_end()
print("left")
"""


@pytest.mark.dist
def test_no_rank_leaves_before_all_have_come_to_the_end_of_the_run(tmp_path: Path) -> None:
    """A rank was stopped between its last step and its exit: the others left, and torchrun waited for it without limit."""
    with processes(tmp_path, "-c", AT_END) as ranks:
        assert ranks[0].wait(100) == LATE
        output = (tmp_path / "rank-0.txt").read_text()
        assert (
            "rank 1 on " in output and "did not arrive; rank 0 waits in the end of the run" in output and "left" not in output
        )


@pytest.mark.dist
@pytest.mark.slow
def test_a_job_whose_rank_0_is_stopped_after_the_last_line_ends_well(digits: Path, tmp_path: Path) -> None:
    live_job.recipe(tmp_path, digits)
    job = live_job.Job(tmp_path, lambda: live_job.started(tmp_path, settings=("stop_at=4step",)), live_job.children)
    try:
        journal = job.run / "journal.jsonl"
        wait_for(lambda: journal.is_file() and '"kind":"end"' in journal.read_text(), 200)
        job.ranks()["0"].send_signal(signal.SIGSTOP)
        assert job.process.wait(200) == 0, (tmp_path / "out.txt").read_text()
    finally:
        job.end()
    assert [line["step"] for line in lines(job.run, "step")] == [1, 2, 3, 4]
    assert {line["status"] for line in lines(job.run, "end")} == {"stopped"}


def beat(count: int, entered: int, place: str = "step, step 12", host: str = "a") -> Beat:
    return Beat(count, entered, "all_reduce", place, host)


def test_a_rank_that_has_entered_fewer_collectives_is_late() -> None:
    now = {0: beat(9, 50), 1: beat(9, 49, "waiting for data, step 12", "b"), 2: beat(9, 50)}
    text = describe(0, 3, 600, {rank: beat(6, 50) for rank in range(3)}, now)
    assert text.startswith(
        "rank 1 on b (last at waiting for data, step 12) did not arrive; rank 0 waits in all_reduce (step, step 12)"
    )
    assert "engine.timeout=600 s have passed" in text


def test_a_rank_without_new_heartbeats_is_late_wherever_it_was() -> None:
    before = {0: beat(6, 50), 1: beat(7, 50)}
    text = describe(0, 3, 600, before, {0: beat(9, 50), 1: beat(7, 50, host="b")})
    assert text.startswith(
        "rank 1 on b (last at step, step 12; no heartbeat any more: process stopped, node lost or network cut); rank 2 (no"
    )


def test_a_collective_that_all_ranks_entered_names_the_hosts() -> None:
    text = describe(1, 2, 600, {0: beat(6, 50), 1: beat(6, 50)}, {0: beat(9, 50), 1: beat(9, 50, host="b")})
    assert text.startswith(
        "all 2 ranks are in the same collective, which does not complete: check devices and network of a, b; rank 1"
    )


def test_many_late_ranks_are_counted() -> None:
    text = describe(0, 100, 600, {}, {rank: beat(9, 50 - (rank > 50)) for rank in range(100)})
    assert text.count("last at") == 8 and " and 41 more did not arrive" in text
