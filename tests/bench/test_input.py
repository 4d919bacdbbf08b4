"""`trilevel bench input`: every row measures what its label names, on the same images; --order-only; pixel errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support import images as drawn
from trainer.__main__ import main
from trainer.bench.input import ratios
from trainer.config.schema import AugmentConfig
from trainer.data.augment.decode import EncodedImage, decode, decode_exact
from trainer.data.augment.transform import Transform

RECIPE = """
name: job
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32}
data: {train: "drawn/train-*.tar", validation: "drawn/train-*.tar", batch: 64, micro_batch: 64}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(RECIPE)
    for i in range(40):
        path = Path(f"pictures/c{i % 4}/img{i:03d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn.jpeg(i, 300, 280))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_all_rows_run_on_the_same_images(job: Path, workers: int, capsys: Any) -> None:
    words = ["bench", "input", "job.yaml", "--images", "pictures", "--workers", str(workers), "--batch", "4", "--passes", "1"]
    if workers == 2:
        words += ["--rows", "ours,bare_decode,webdataset,imagefolder,timm"]
    assert main([*words, "--json", "bench.json"]) == 0
    rows, message = json.loads(Path("bench.json").read_text()), capsys.readouterr().out
    assert {"ours", "bare_decode", "webdataset", "imagefolder", "timm"} <= rows.keys()
    for name, row in rows.items():
        if row["did"] == "not installed":
            assert name in ("mosaicml_streaming", "litdata") and "median" not in row
        else:
            assert 0 < row["min"] <= row["median"] <= row["max"] and row["unit"] in ("images/s", "s"), name
    assert "ours / webdataset: " in message and "by CPU time" in message
    for path in ("decoding, ", "decoding of the crop", "resize", "shear", "translation", "smoothing"):
        assert path in message, "the error of every fast path is printed"
    if workers == 0:
        assert {"ours_short_side", "ours_randaugment", "timm_randaugment", "epoch_all", "epoch_dropped"} <= rows.keys()
        assert "short side 256" in rows["ours_short_side"]["did"] and "posterize" in rows["timm_randaugment"]["did"]


def test_ratios_are_of_the_medians() -> None:
    row = {"min": 1.0, "max": 1.0, "unit": "images/s", "did": ""}
    rows = {
        "ours": row | {"median": 500.0, "cpu_ms": 1.0},
        "webdataset": row | {"median": 200.0, "cpu_ms": 3.0},
        "litdata": {"did": "-"},
    }
    found = ratios(rows, [("ours", "webdataset"), ("ours", "litdata"), ("ours", "timm")])
    assert found == ["ours / webdataset: 2.50; by CPU time per image 3.00"]


def test_an_unknown_row_and_too_few_images_are_refused(job: Path, capsys: Any) -> None:
    assert main(["bench", "input", "job.yaml", "--images", "pictures", "--batch", "4", "--rows", "dali"]) == 2
    assert "--rows: unknown value 'dali'; valid values: ours" in capsys.readouterr().err
    assert main(["bench", "input", "job.yaml", "--images", "pictures", "--batch", "30"]) == 2
    assert "40 images are fewer than two batches of 30" in capsys.readouterr().err


def test_the_order_of_imagenet_on_a_rank_is_made_in_less_than_a_second(job: Path, capsys: Any) -> None:
    words = ["--order-only", "--examples", "1281167", "--shards", "1024", "--world", "8", "--json", "order.json"]
    assert main(["bench", "input", "job.yaml", *words]) == 0
    message = capsys.readouterr().out
    assert (
        "shuffle quality, class-sorted shards: classes" in message
        and "shuffle quality, classes mixed over the shards" in message
    )
    rows = json.loads(Path("order.json").read_text())
    assert rows["start"]["median"] < 1.0 and rows["resume"]["median"] < 1.0, "seconds, against milliseconds on an idle machine"
    assert rows["set_up"]["median"] <= rows["start"]["median"] and 0 < rows["memory"]["median"] < 64


def _photographs(config: pytest.Config) -> list[bytes]:
    """Drawn JPEGs in every common subsampling, with --images real ones beside them."""
    found = [
        drawn.encoded(
            drawn.picture(i, 330 + 7 * i, 270 + 5 * i), quality=quality, subsampling=subsampling, progressive=progressive
        )
        for i, (quality, subsampling, progressive) in enumerate(
            (q, s, p) for q in (75, 95) for s in (0, 1, 2) for p in (False, True)
        )
    ] + [drawn.encoded(drawn.picture(99, 301, 203, "L"))]
    source = config.getoption("--images")
    if source:
        from trainer.data.shards.image_sources import images

        found += [image.read() for image in images(source, None, "train", 0, Path("/tmp"))["train"][:32]]
    return found


def test_fast_decode_and_fast_resize_against_pil(request: pytest.FixtureRequest, record_property: Any) -> None:
    """Reported: mean and largest error in grey levels of our resize against PIL on the same input. The decoder's pixels are PIL's."""
    decoded, resized = [], []
    transform = Transform(AugmentConfig(), 224, train=True)
    for number, data in enumerate(_photographs(request.config)):
        exact, ours = decode_exact(memoryview(bytearray(data))), decode(memoryview(bytearray(data)))
        pil = torch.from_numpy(np.array(exact)).permute(2, 0, 1)
        assert pil.shape == ours.shape
        decoded.append((pil.int() - ours.int()).abs())
        box = transform.box(number, *ours.shape[1:])
        assert box is not None
        top, left, height, width = box
        cut = PIL.Image.fromarray(ours[:, top : top + height, left : left + width].permute(1, 2, 0).numpy())
        cut = cut.resize((224, 224), PIL.Image.Resampling.BICUBIC)
        made = transform.apply(EncodedImage.of(ours), number).pixels.int()
        resized.append((torch.from_numpy(np.array(cut)).permute(2, 0, 1).int() - made).abs())
    for name, errors in (("decode", decoded), ("resize", resized)):
        mean, most = max(float(e.float().mean()) for e in errors), max(int(e.max()) for e in errors)
        record_property(name, f"mean {mean:.3f}, largest {most}")
        print(f"{name} against PIL, {len(errors)} images: worst mean error {mean:.4f}, largest {most} of 255")
    # the same filter with 16-bit weights, as torchvision's: PIL's have more bits, which shows at hard edges and in large shrinks;
    # seen: drawn images .04 and 4, real photographs .27 and 14
    assert max(int(e.max()) for e in resized) <= 16 and max(float(e.float().mean()) for e in resized) < 0.5
    assert max(int(e.max()) for e in decoded) == 0
