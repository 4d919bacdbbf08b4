"""A restart finds the graphs of the run before it: real code generation, two starts, one folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from sparsity.attention import gather_tokens
from sparsity.attention_kernel import using
from tests.conftest import ROOT, environment, lines
from tests.laws.test_main_job import RECIPE
from trainer.engine.graph_cache import cache_whole_graphs

WORDS = [
    "engine.compile=true",
    "tokens.method=all",
    "connections.method=all",
    "examples.method=all",
    "control=0",
]
SMALL = ["model.drop_path=0", "model.args={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}", "checkpoint.every=2step"]


def start(folder: Path, *words: str) -> dict[str, int]:
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "jobs" / "compile_cache.py"),
        "train",
        str(folder / "job.yaml"),
        *WORDS,
        *SMALL,
        *words,
    ]
    env = environment(HOME=str(folder))
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"hits"')))


@pytest.mark.dist
@pytest.mark.slow
def test_a_restart_generates_no_code_again(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    first = start(tmp_path, "stop_at=2step")
    again = start(tmp_path, "--resume", "stop_at=4step")
    assert first["misses"] > 0
    assert again["hits"] > 0 and again["misses"] == 0
    run = tmp_path / "runs" / "job"
    assert {line["compile_cache"] for line in lines(run, "start")} == {str(tmp_path / ".cache/trilevel/compiled")}
    reported = [line["time_to_first_step"] for line in lines(run, "step") if "time_to_first_step" in line]
    assert len(reported) == 2 and all(seconds > 0 for seconds in reported)
    print(f"start to first step: {reported[0]:.1f} s, at the restart {reported[1]:.1f} s")


@pytest.mark.slow
def test_graphs_that_choose_attention_kernels_and_gather_tokens_are_cached_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is a graph of its own; torch's own allow list leaves all of them out."""
    monkeypatch.setattr(inductor, "unsafe_marked_cacheable_functions", {})
    images, kept = torch.randn(2, 6, 16), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 5]])

    class Network(torch.nn.Module):
        def __init__(self, kernel: str) -> None:
            super().__init__()
            self.kernel, self.linear = kernel, torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = gather_tokens(self.linear(x), kept, 1).view(2, 4, 2, 8).transpose(1, 2)
            with using(self.kernel):
                return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum()

    def found(kernel: str) -> tuple[int, ...]:
        torch.compiler.reset()
        counters.clear()
        network = Network(kernel)
        network.compile()
        network(images).backward()
        return tuple(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("bypass", "miss", "hit"))

    def around(kernel: str) -> tuple[int, ...]:
        """As `engine.attention=kernel`: in force around a graph that names none."""
        torch.compiler.reset()
        counters.clear()
        cache_whole_graphs(kernel)
        with using(kernel), torch.no_grad():
            torch.compile(torch.nn.functional.scaled_dot_product_attention)(*images.view(3, 1, 1, 8, 8))
        return tuple(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("bypass", "miss", "hit"))

    with fresh_cache():
        assert found("flash") == (1, 0, 0), "torch has learnt these functions: graph_cache.py can go"
        cache_whole_graphs()
        assert [found(kernel) for kernel in ("flash", "efficient", "flash")] == [(0, 1, 0), (0, 1, 0), (0, 0, 1)]
        assert [around(kernel) for kernel in ("flash", "math", "math", "flash")] == [(0, 1, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1)]
