"""`trilevel export RUN OUT.onnx --density .5`: the value-based form at one density as an ONNX file with a dynamic batch.

`pip install trilevel[onnx]`. The file is compared with torch on two batch sizes
before it replaces OUT. Tokens are sorted by ONNX's TopK, which puts the lower position first among equal values, as `scores.ranked` does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.checkpoint.export import export
from trainer.checkpoint.onnx_int8 import Int8, quantize_for, session
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.model.exported import AnyDensity, load_exported

TOLERANCE = 1e-4  # of the largest logit, float32
OPSET = 18


class ExportedOnnx(NamedTuple):
    """density: of the file. difference: the largest of a logit against torch, relative to the largest logit, in float32."""

    path: Path
    density: float
    difference: float
    size: int
    int8: Int8 | None = None

    def text(self) -> str:
        return (
            f"{self.path}: input images (batch, 3, {self.size}, {self.size}) float32, normalised; output logits; density {self.density:g}; "
            f"differs from torch by {self.difference:.1e} of the largest logit{' in float32' if self.int8 else ''}"
            + (f"\n{self.int8.text()}" if self.int8 else "")
        )


class AtDensity(nn.Module):
    """What a file computes. Its graph keeps the names of these modules, so whoever writes another wrapper writes other bytes."""

    def __init__(self, network: AnyDensity, density: float):
        super().__init__()
        self.network, self.density = network, density

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, self.density)


def export_onnx(
    run: Path | str,
    out: Path | str,
    density: float,
    which: str = "latest",
    ema: bool | None = None,
    form: str = "dense",
    calibration: int | None = None,
) -> ExportedOnnx:
    """Write the network of a run's checkpoint at `density`, 1 = all tokens; which, ema, form: as in `export`.

    calibration: training images of the run with which int8 ranges are found; None: float32. Raises ConfigError, and DataError where
    the images for int8 cannot be read.
    """
    refuse_missing()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    int8 = None
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".onnx-") as folder:
        network = load_exported(export(run, Path(folder) / "weights.safetensors", which, ema, form).path)
        network.source = str(run)  # for messages; its file is gone after this
        network.refuse_density(density)
        size = network.image_size
        whole, written = AtDensity(network, density).eval(), Path(folder) / "model.onnx"
        write(whole, torch.zeros(2, 3, size, size), written)
        difference = _difference(whole, session(written), size)
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"export {out}: onnxruntime's logits differ from torch's by {difference:.1e} of the largest logit; nothing was written; "
                "report it"
            )
        if calibration is not None:
            floats, written = written, Path(folder) / "int8.onnx"
            int8 = quantize_for(load_run(Path(run)), floats, written, calibration, whole)
        written.replace(out)
    return ExportedOnnx(out, density, difference, size, int8)


def write(network: nn.Module, images: Tensor, path: Path) -> None:
    """A network of images (B, 3, S, S) as ONNX, for any B; `images` to trace it with, B >= 2."""
    import onnxscript

    op: Any = onnxscript.opset18

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Reshape(op.Gather(op.Shape(self), op.Constant(value_int=dim), axis=0), op.Constant(value_ints=[1]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    program = torch.onnx.export(
        network, (images,), dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        custom_translation_table={torch.ops.aten.sort.stable: sort},  # torch has none for a stable sort
    )  # fmt: skip
    assert program is not None
    program.save(path)


def _difference(network: nn.Module, session: Any, size: int) -> float:
    """On batches of 1 and 5, none of which the file was traced with."""
    worst = 0.0
    for batch in (1, 5):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
        ours = network(images)
        (theirs,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, float((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max()))
    return worst


def refuse_missing() -> None:
    """Raises ConfigError without the libraries of ONNX."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ConfigError(f"ONNX: {error}; install the libraries: pip install 'trilevel[onnx]'") from error
