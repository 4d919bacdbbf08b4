"""`launch node --nodes MIN:MAX` for real: two agents on this machine, one is killed, the other continues from the checkpoint alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, free_port, kill, lines, wait_for

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
STEPS = 60


def node(folder: Path, digits: Path, number: int, port: int) -> subprocess.Popen[str]:
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    words = [*data, "log_every=1step", "control=0", "tracking.to=journal", f"stop_at={STEPS}step", "checkpoint.every=5step"]
    reported = ["--nodes", "1:2", "--number", str(number), "--processes", "1", "--address", "127.0.0.1", "--port", str(port)]
    with (folder / f"node{number}.txt").open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "node", CONFIG, *words, *reported, "--here", "127.0.0.1"],
            cwd=folder, env=environment(GLOO_SOCKET_IFNAME="lo"), stdout=out, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_that_is_lost_leaves_the_other_to_go_on_from_the_checkpoint(digits, tmp_path):
    port = free_port()
    nodes = [node(tmp_path, digits, number, port) for number in (0, 1)]
    run = tmp_path / "runs" / "quickstart"

    def reported() -> str:
        return "\n".join((tmp_path / f"node{number}.txt").read_text()[-6000:] for number in (0, 1))

    try:

        def saved() -> bool:
            assert all(one.poll() is None for one in nodes), reported()
            return (run / "checkpoints" / "latest").is_file()

        wait_for(saved, 600)
        kill(nodes[1])
        assert nodes[0].wait(900) == 0, reported()
    finally:
        for one in nodes:
            if one.poll() is None:
                kill(one)
    assert [line["world"] for line in lines(run, "start")] == [2, 1], reported()
    (resumed,) = lines(run, "resume")
    assert resumed["step"] >= 5 and resumed["step"] % 5 == 0
    assert [line["step"] for line in lines(run, "step")] == list(range(1, STEPS + 1))
    audit = [sys.executable, "-m", "trainer", "audit", str(run)]
    done = subprocess.run(audit, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
