"""ONNX at one density: the same tokens and logits as torch, at batch sizes that the file was not traced with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsity.build import build
from sparsity.types import Plan
from tests.support.sait import WEIGHTS, write
from trainer import load_model
from trainer.__main__ import main
from trainer.checkpoint import export_onnx as onnx_file
from trainer.checkpoint.export_onnx import export_onnx
from trainer.checkpoint.onnx_int8 import session
from trainer.config.errors import ConfigError
from trainer.config.load import load


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    monkeypatch.setattr(onnx_file, "export", lambda *_: SimpleNamespace(path=Path(WEIGHTS)))  # of a checkpoint: tests/laws
    monkeypatch.setattr(onnx_file, "load_run", lambda _: load("c.yaml"))
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


def test_int8_is_calibrated_with_training_images_and_answers_nearly_as_float32(run: str, capsys: Any) -> None:
    """39 of 40 images set the ranges, one is broken; the message has what was measured on the validation images."""
    import onnx
    import onnxruntime

    assert main(["export", run, "float.onnx", "--density", ".5"]) == 0
    capsys.readouterr()
    assert main(["export", run, "int8.onnx", "--density", ".5", "--int8"]) == 0
    text = capsys.readouterr().out
    size = Path("int8.onnx").stat().st_size
    assert f"int8, calibrated with 39 training images: {size:,} bytes, {Path('float.onnx').stat().st_size:,} in float32" in text
    model = onnx.load("int8.onnx")
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1]
    assert len(weights) == 4 * 4 + 2, "four linear layers in each of four blocks, the patch embedding and the head"
    images = torch.randn(64, 3, 32, 32)
    theirs, ours = (
        torch.from_numpy(onnxruntime.InferenceSession(f"{name}.onnx").run(None, {"images": images.numpy()})[0])
        for name in ("float", "int8")
    )
    assert 0 < float((ours - theirs).abs().mean() / theirs.abs().mean()) < 0.25
    share = float(re.search(r"for ([\d.]+) % of 39 validation images", text)[1])  # pyright: ignore[reportOptionalSubscript]
    assert share > 50  # of 10 classes, by weights that nothing has trained


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_swin_as_onnx_gives_torchs_logits_dense_and_at_a_reduced_density(name: str, share: float, tmp_path: Path) -> None:
    """40 pixels: windows of 4 x 4 do not divide the grid of 10 x 10, so there is padding too."""
    import timm

    net = timm.create_model(name, img_size=40, window_size=4, embed_dim=8, depths=(3, 1), num_heads=(1, 2), num_classes=5)
    swin = build(net, tokens="topk", blocks=(0, 1), position="block").eval()

    class AtShare(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return swin(images, Plan(share)).logits

    whole, file = AtShare(), tmp_path / "swin.onnx"
    whole.swin = swin
    onnx_file.write(whole, torch.zeros(2, 3, 40, 40), file)
    with torch.no_grad():
        assert onnx_file._difference(whole, session(file), 40) < 2e-5


def test_a_file_that_differs_is_not_written(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_difference", lambda *_: 0.5)
    with pytest.raises(ConfigError, match=r"differ from torch's by 5\.0e-01 of the largest logit; nothing was written"):
        export_onnx(run, "out.onnx", 0.5)
    assert not list(Path().glob("*onnx*"))


def test_a_density_that_the_run_has_not_is_refused_before_the_trace(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As one message, not as the end of torch.onnx's."""
    loaded = onnx_file.load_exported(WEIGHTS)
    loaded.tokens = load("c.yaml", ["tokens.method=all", "plan.method=constant"]).tokens
    monkeypatch.setattr(onnx_file, "load_exported", lambda _: loaded)
    assert main(["export", run, "out.onnx", "--density", ".5"]) == 2
    wanted = "trilevel: run: density=0.5 with tokens.method=all, which has no density; take density 1, or a run with topk\n"
    assert capsys.readouterr().err == wanted and not list(Path().glob("*onnx*"))


def test_what_cannot_be_is_refused(run: str, capsys: Any) -> None:
    for words, message in (
        (["out.onnx"], "an ONNX file has one density; add --density"),
        (["out.safetensors", "--density", ".5"], "only for an ONNX file"),
        (["out.onnx", "--density", "1.5"], "--density 1.5: must be keep ratios in (0, 1]"),
        (["out.onnx", "--density", ".5,.7"], "an ONNX file has one density"),
        (["out.onnx", "--density", ".5", "--int8", "--calibration", "0"], "--calibration 0: int8 needs training images"),
        (["out.onnx", "--density", ".5", "--calibration", "8"], "--calibration 8: only with --int8"),
        (["out.safetensors", "--int8"], "--int8: only for an ONNX file; name it OUT.onnx"),
    ):
        assert main(["export", run, *words]) == 2
        assert message in capsys.readouterr().err
