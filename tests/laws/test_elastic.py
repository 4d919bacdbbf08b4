"""One run over many worlds: 4 processes on two nodes, then 2, 3 and 1, each with another ZeRO stage. Law 3 of docs/laws.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import command, environment, free_port, lines
from tests.laws.test_main_job import RECIPE

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def run(folder: Path, nodes: int, world: int, *words: str) -> None:
    """`trilevel train job.yaml WORDS` on `world` processes, by one torchrun for each of `nodes`."""
    line = command(world, "train", "job.yaml", *words)
    if nodes > 1:
        one = ["--nproc_per_node", str(world // nodes), "--nnodes", str(nodes), "--master_addr", "127.0.0.1"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *one, "--master_port", str(free_port())]
        started = [[*torchrun, "--node_rank", str(n), "-m", "trainer", "train", "job.yaml", *words] for n in range(nodes)]
    else:
        started = [line]
    ends = [
        subprocess.Popen(s, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for s in started
    ]
    for end in ends:
        output, _ = end.communicate(timeout=600)
        assert end.returncode == 0, output[-6000:]


@pytest.mark.timeout(1800)
def test_four_two_three_one(digits: Path, tmp_path: Path) -> None:
    for name in ("whole", "many"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    run(tmp_path / "whole", 1, 2)
    run(tmp_path / "many", 2, 4, "stop_at=4step")
    run(tmp_path / "many", 1, 2, "--resume", "engine.zero=3", "stop_at=9step")
    run(tmp_path / "many", 1, 3, "--resume", "engine.zero=2", "stop_at=14step")
    run(tmp_path / "many", 1, 1, "--resume", "engine.zero=0")
    whole, many = (tmp_path / name / "runs" / "job" for name in ("whole", "many"))
    assert [line["world"] for line in lines(many, "start")] == [4, 2, 3, 1]
    facts = [{line["step"]: (line["chain"], line["loss"]) for line in lines(one, "step")} for one in (whole, many)]
    assert facts[0].keys() == facts[1].keys() and len(facts[0]) > 15
    assert [chain for chain, _ in facts[0].values()] == [chain for chain, _ in facts[1].values()]
    np.testing.assert_allclose(*([loss for _, loss in fact.values()] for fact in facts), rtol=2e-4)
    scores = [[(e["step"], e["ema"], e["images"]) for e in lines(one, "eval")] for one in (whole, many)]
    assert scores[0] == scores[1]
