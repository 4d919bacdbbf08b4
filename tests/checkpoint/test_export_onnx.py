"""ONNX at one density: the same tokens and logits as torch, at batch sizes that the file was not traced with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.sait import WEIGHTS, write
from trainer import load_model
from trainer.__main__ import main
from trainer.checkpoint import export_onnx as onnx_file
from trainer.checkpoint.export_onnx import export_onnx
from trainer.config.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    monkeypatch.setattr(onnx_file, "export", lambda *_: SimpleNamespace(path=Path(WEIGHTS)))  # of a checkpoint: tests/laws
    return "run"


def test_onnxruntime_gives_torchs_logits_at_any_batch_size(run: str, capsys: Any) -> None:
    import onnxruntime

    assert main(["export", run, "out.onnx", "--density", ".5"]) == 0
    assert "density 0.5; differs from torch by" in capsys.readouterr().out
    session, model = onnxruntime.InferenceSession("out.onnx"), load_model(WEIGHTS)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), model(images, density=0.5), atol=1e-5)
        assert not torch.allclose(torch.from_numpy(found), model(images), atol=1e-5), "the file prunes"
    assert [path.name for path in Path().glob("*onnx*")] == ["out.onnx"], "nothing temporary stays"


def test_a_file_that_differs_is_not_written(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_difference", lambda *_: 0.5)
    with pytest.raises(ConfigError, match=r"differ from torch's by 5\.0e-01 of the largest logit; nothing was written"):
        export_onnx(run, "out.onnx", 0.5)
    assert not list(Path().glob("*onnx*"))


def test_what_cannot_be_is_refused(run: str, capsys: Any) -> None:
    for words, message in (
        (["out.onnx"], "an ONNX file has one density; add --density"),
        (["out.safetensors", "--density", ".5"], "only for an ONNX file"),
        (["out.onnx", "--density", "1.5"], "--density 1.5: must be keep ratios in (0, 1]"),
        (["out.onnx", "--density", ".5,.7"], "an ONNX file has one density"),
    ):
        assert main(["export", run, *words]) == 2
        assert message in capsys.readouterr().err
