"""int8 of an ONNX file by static calibration (onnxruntime's quantizer, QDQ form): weights per channel, activations per tensor.

Quantized are the products with weights: linear layers and the patch embedding. Attention's own products, softmax, norms and GELU stay
float32: they are few multiply-adds, and their ranges cost accuracy.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.loader.calibration import calibration_images
from trainer.data.loader.dataset import open_indexes

OPERATORS = ["Conv", "Gemm", "MatMul"]
CHECKED = 1000  # validation images on which top-1 is compared with float32


class Int8(NamedTuple):
    """images: training images of the calibration. agreement: share of `checked` validation images with the top-1 of float32."""

    images: int
    agreement: float
    checked: int
    bytes: int
    float_bytes: int

    def text(self) -> str:
        return (
            f"int8, calibrated with {self.images} training images: {self.bytes:,} bytes, {self.float_bytes:,} in float32; the top-1 of "
            f"torch in float32 for {100 * self.agreement:.2f} % of {self.checked} validation images"
        )


def quantize(source: Path, out: Path, batches: Iterable[np.ndarray]) -> None:
    """Write the int8 form of the float32 file `source`. batches: normalised images (b, 3, S, S) float32, at least one."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            found = next(self.batches, None)
            return None if found is None else {"images": found}

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".int8-") as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"  # shapes inferred, constants folded: the quantizer needs both
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "ActivationSymmetric": False, "WeightSymmetric": True},
        )


def session(path: Path, arena: bool = True) -> Any:
    """An onnxruntime session on the CPU with as many threads as torch has. arena: it keeps its memory between two calls, as by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def quantize_for(config: Config, source: Path, out: Path, images: int, reference: nn.Module) -> Int8:
    """Quantize with `images` training images of the run, and compare top-1 on its validation images with `reference`, float32.

    Raises ConfigError without images to calibrate with, DataError where the shards are not there.
    """
    if images < 1:
        raise ConfigError(f"--calibration {images}: int8 needs training images for its ranges; must be >= 1")
    cpu = torch.device("cpu")
    index, validation = open_indexes(config.data)
    shown = 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal shown
        for batch in calibration_images(config, index, images, cpu, "calibrate int8"):
            if len(batch):
                shown += len(batch)
                yield batch.numpy()

    quantize(source, out, batches())
    quantized = session(out)
    same = checked = 0
    for batch in calibration_images(config, validation, CHECKED, cpu, "compare int8 with float32"):
        with torch.no_grad():
            right: Tensor = reference(batch).argmax(1)
        (ours,) = quantized.run(None, {"images": batch.numpy()})
        same, checked = same + int((torch.from_numpy(ours).argmax(1) == right).sum()), checked + len(batch)
    return Int8(shown, same / max(1, checked), checked, out.stat().st_size, source.stat().st_size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice on its root logger, of which this file already took what applies."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
