"""One rank of a node compiles a graph, the others load its code: the lock by itself, and two real ranks over gloo with real code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx, config

from tests.conftest import ROOT, environment, torchrun
from trainer.config.errors import ConfigError
from trainer.engine.compile_once import COMMUNICATE, locked, share_compiling
from trainer.engine.environment import use_persistent_compile_cache
from trainer.storage.local_rank import local_rank


def test_the_lock_is_held_by_one_and_the_others_go_on_after_their_limit(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, 5) as first:
        began = time.monotonic()
        with locked(file, 0.2) as second:
            assert first and not second and time.monotonic() - began < 3
    with locked(file, 0.2) as later:
        assert later


def test_the_lock_of_a_rank_that_dies_is_free(tmp_path: Path) -> None:
    code = f"""if True:
        import time, pathlib
        from trainer.engine.compile_once import locked
        with locked(pathlib.Path({str(tmp_path / "lock")!r}), 0) as held:
            print(held, flush=True)
            time.sleep(60)
    """
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "True\n"
    with locked(tmp_path / "lock", 0.1) as held:
        assert not held
    rank.kill()
    with locked(tmp_path / "lock", 10) as held:
        assert held
    rank.wait()


def test_without_a_lock_the_block_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that can't be written, and a file system without locks."""
    with pytest.warns(UserWarning, match="set TORCHINDUCTOR_CACHE_DIR"), locked(tmp_path / "none" / "lock", 1) as held:
        assert not held

    def refused(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.warns(UserWarning, match="No locks available"), locked(tmp_path / "lock", 1) as held:
        assert not held


@pytest.mark.parametrize(("ranks", "visible", "shared"), [(1, 0, False), (2, 0, True), (2, 1, True), (2, 2, False)])
def test_ranks_share_code_that_names_no_gpu_or_the_same_number(
    ranks: int, visible: int, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """visible: GPUs that a rank sees. Compilers: all cores of the node for the one rank that compiles."""
    plain = compile_fx._compile_fx_inner
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", plain)
    with config.patch(compile_threads=8), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        use_persistent_compile_cache(1.0)
        assert ["each has 2 GPUs to choose from; PET_VIRTUAL_LOCAL_RANK=1" in str(one.message) for one in warned] == [True] * (
            visible > 1
        )
        assert (compile_fx._compile_fx_inner is not plain) == shared
        assert config.compile_threads == (8 if shared or ranks == 1 else 4)


@pytest.mark.parametrize("name", [None, *COMMUNICATE])
def test_ranks_compile_apart_where_torch_has_no_place_for_the_lock_or_they_communicate_inside(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """name: of a setting of torch by which ranks wait for each other while they compile: those without the lock would never come."""
    plain = compile_fx._compile_fx_inner
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    if name is None:
        monkeypatch.delattr(compile_fx, "_compile_fx_inner")
    with config.patch({"compile_threads": 8} | ({name: True} if name else {})):
        with pytest.warns(UserWarning, match=f"each rank of this node compiles every graph: .*{name or '_compile_fx_inner'}"):
            assert use_persistent_compile_cache(1.0) == str(tmp_path)
        assert getattr(compile_fx, "_compile_fx_inner", plain) is plain and config.compile_threads == 4


def test_a_second_engine_of_a_process_waits_for_no_lock_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", lambda graph, **named: (graph, named))
    share_compiling(str(tmp_path), 30)
    share_compiling(str(tmp_path), 30)
    began = time.monotonic()
    assert compile_fx._compile_fx_inner("graph", layout=1) == ("graph", {"layout": 1})  # type: ignore[arg-type]
    assert time.monotonic() - began < 5 and len(list(tmp_path.glob("compiling-*.lock"))) == 1


def test_the_number_on_the_node_where_each_rank_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables as torchrun exports them, of two nodes with four ranks each, and of a node with two ranks beside one with one."""
    equal = {"RANK": "5", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for name, value in (equal | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PET_VIRTUAL_LOCAL_RANK", raising=False)
    assert local_rank() == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("PET_VIRTUAL_LOCAL_RANK", "1")
    assert local_rank() == 1
    for name, value in {"RANK": "2", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"LOCAL_WORLD_SIZE=1 of WORLD_SIZE=3 on 2 nodes; .* unset PET_VIRTUAL_LOCAL_RANK"):
        local_rank()
    monkeypatch.delenv("GROUP_WORLD_SIZE")  # another launcher, whose LOCAL_RANK is what it says
    assert local_rank() == 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_compile_each_graph_once(tmp_path: Path) -> None:
    """Forward and backward of a network: one rank makes both, the other finds both. Without the lock (`apart`) each makes both."""
    job = [sys.executable, *torchrun(2), str(ROOT / "tests/support/jobs/compile_once.py")]
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
    done = subprocess.run(job, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted((rank["made"], rank["found"]) for rank in ranks) == [(0, 2), (2, 0)]
