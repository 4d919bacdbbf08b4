"""`make gpu PART=study` on a GPU host: which runs a sitting asks the launcher for, and where it looks for the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.bench.gpu import study
from trainer.bench.gpu.report import Host

FILE = "name: mini\nquestion: q\nconfig: c\nreference: a\nseeds: [0, 1]\narms: {a: {}, b: {}, c: {}, d: {}}\n"


def keep(journals: Path, *runs: str) -> None:
    (journals / "mini").mkdir(parents=True, exist_ok=True)
    for run in runs:
        (journals / "mini" / f"{run}.jsonl.xz").touch()


def test_a_sitting_asks_for_the_next_arms_of_one_seed_until_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, journals, asked = tmp_path / "mini.yaml", tmp_path / "journals", []
    file.write_text(FILE)

    def sitting(words: list[str], kept: Path, limit: float) -> dict[str, Any]:
        assert (kept, limit) == (journals, 7.0)
        asked.append(words)
        keep(journals, *(f"{arm}-seed{words[2]}" for arm in words[4].split(",")))
        return {"finished_runs": 0, "all": True, "ok": True}

    monkeypatch.setattr(study, "sitting", sitting)
    keep(journals, "b-seed0")
    done = [study.next_runs(["study"], file, journals, 7.0)["all"] for _ in range(4)]
    assert done == [False, False, True, True]
    assert asked == [["study", "--seeds", seed, "--arms", arms] for seed, arms in (("0", "a,c,d"), ("1", "a,b,c"), ("1", "d"))]


def test_shards_are_looked_for_and_what_is_missing_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "SOURCE_ROOT", tmp_path / "source")
    with pytest.raises(FileNotFoundError) as error:
        study.shards_of(tmp_path)
    for word in (
        "train-*.tar and test-*.tar",
        f"{tmp_path}/shards/cifar10",
        "source/shards/cifar10",
        "trilevel pack cifar-10-python",
    ):
        assert word in str(error.value)
    for place in (tmp_path / "source", tmp_path):  # those of OUT come first, if they are complete
        folder = place / "shards" / "cifar10"
        folder.mkdir(parents=True)
        (folder / "train-000000.tar").touch()
        if place == tmp_path:
            assert "source" in study.shards_of(tmp_path)[0]
        (folder / "test-000000.tar").touch()
        assert study.shards_of(tmp_path) == [f"data.train={folder}/train-*.tar", f"data.validation={folder}/test-*.tar"]


def test_a_gpu_host_trains_the_full_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tmp_path / "shards" / "cifar10", []
    folder.mkdir(parents=True)
    for name in ("train-000000.tar", "test-000000.tar"):
        (folder / name).touch()
    monkeypatch.setattr(study, "sitting", lambda words, *_: asked.append(words) or {"ok": True})
    for _, row in study.part(Host(torch.device("cpu"), tiny=False, out=tmp_path)):
        row()
    (words,) = asked
    assert (
        words[3:5] == ["study", str(study.SOURCE_ROOT / "configs/studies/cifar10_full.yaml")]
        and f"data.train={folder}/train-*.tar" in words
    )
    assert words[-4:] == ["--seeds", "0", "--arms", "dense,tri_level_0.7,dense_55ep"]
