"""Hostile images: each counts as one broken image, by name; none ends a run, and none takes gigabytes."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.support.images import config, encoded, jpeg, picture, write_tar
from trainer.config.schema import AugmentConfig
from trainer.data.augment import decode as module
from trainer.data.augment.decode import BrokenImage, EncodedImage, decode_exact, frame
from trainer.data.augment.transform import Transform
from trainer.data.loader.build import batch_maker
from trainer.data.order import Rows
from trainer.data.shards.index import build_index
from trainer.preflight.verify_shards import verify

LONG = encoded(PIL.Image.new("RGB", (65_500, 1)), "PNG")


def segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def with_false_header(real: bytes, width: int, height: int, marker: bytes = b"\xff\x01") -> bytes:
    """A JPEG with a marker without a length after SOI. A reader that takes FF E0 as its length continues 65,504 bytes later, at a false
    frame header of width x height inside a comment."""
    frame_header = segment(0xC0, b"\x08" + struct.pack(">HH", height, width) + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0")
    scan = segment(0xDA, b"\x03\x01\0\x02\x11\x03\x11\0\x3f\0")
    first = 2 + struct.unpack(">H", real[4:6])[0]  # the APP0 segment
    start = bytearray(real[:2] + marker + real[2 : 2 + first])
    false = 2 + 2 + 0xFFE0  # where such a reader would continue
    comments = bytearray()
    while len(start) + len(comments) < false + 200:
        comments += segment(0xFE, bytes(30_000))
    found = start + comments + real[2 + first :]
    found[false : false + len(frame_header + scan)] = frame_header + scan
    return bytes(found)


def transforms() -> dict[str, Transform]:
    crops: dict[str, Any] = {crop: AugmentConfig(crop=crop) for crop in ("rrc", "src", "shift", "none")}
    return {"evaluation": Transform(AugmentConfig(), 224, False)} | {c: Transform(a, 224, True) for c, a in crops.items()}


@pytest.mark.parametrize("name", transforms())
def test_a_line_of_pixels_is_refused_before_it_grows(name: str) -> None:
    """4 x 10^9 pixels once its short side is 256: 16 GiB from a PNG of 270 bytes."""
    transform, key = transforms()[name], 5
    if name == "rrc":  # a crop of it is resized, never all of it
        assert transform(memoryview(LONG), key).pixels.shape == (3, 224, 224)
        return
    with pytest.raises(BrokenImage, match=r"65500 x 1 pixels, resized to a short side of (224|256), .*decompression bomb"):
        transform(memoryview(LONG), key)
    assert transform(memoryview(encoded(PIL.Image.new("RGB", (1000, 4)), "PNG")), key).pixels.shape == (3, 224, 224)


def test_verify_names_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(0), "a.cls": b"0", "b.png": LONG, "b.cls": b"1"})
    build_index(str(tmp_path / "x.tar"), progress=False)
    (found,) = verify(str(tmp_path / "x.tar"), workers=1, progress=False)
    assert found.id == 1 and "key 'b'" in found.where and "decompression bomb" in found.reason


@pytest.mark.parametrize("marker", [b"\xff\x01", *(bytes([0xFF, 0xD0 + n]) for n in range(8))])
def test_markers_without_a_length_have_none(marker: bytes) -> None:
    real = encoded(picture(1, 60, 60))
    found = with_false_header(real, 5000, 5000, marker)
    assert frame(found)[:2] == ((0, 0) if marker == b"\xff\x01" else (60, 60))
    try:
        wanted = np.array(decode_exact(found))
    except BrokenImage:  # then training may not take it either
        with pytest.raises(BrokenImage):
            EncodedImage(found).whole()
    else:
        assert (EncodedImage(found).whole().permute(1, 2, 0).numpy() == wanted).all()


@pytest.mark.parametrize("size", [(5000, 5000), (61, 60), (8, 8)])
def test_every_crop_of_a_jpeg_with_a_false_header_is_right_or_broken(size: tuple[int, int]) -> None:
    data = with_false_header(encoded(picture(1, 60, 60)), *size)
    for transform in transforms().values():
        for key in range(20):
            try:
                assert transform(memoryview(data), key).pixels.shape == (3, 224, 224)
            except BrokenImage:
                continue


def test_a_bomb_behind_a_small_false_header_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 300_000)  # 640 x 640 for 12,000 x 12,000
    data = with_false_header(encoded(PIL.Image.new("RGB", (640, 640))), 8, 8)
    with pytest.raises(BrokenImage, match="no image"):  # as in evaluation
        EncodedImage(data).whole()
    with pytest.raises(BrokenImage, match="decompression bomb"):
        EncodedImage(with_false_header(encoded(PIL.Image.new("RGB", (640, 640))), 8, 8, b"\xff\xd0")).whole()


@pytest.mark.parametrize("library", ["TurboJPEG", "PIL"])
def test_decoded_pixels_must_have_the_size_of_the_header(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However differently two decoders read one header."""
    if library == "PIL":
        monkeypatch.setattr(module.turbojpeg, "library", lambda: None)
    real = frame(data := encoded(picture(1, 60, 60)))
    monkeypatch.setattr(module, "frame", lambda _: real._replace(height=50, width=50))
    with pytest.raises(BrokenImage, match="50 x 50 pixels in its header, 60 x 60 decoded"):
        EncodedImage(data).box(0, 0, 40, 40)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("x"), ValueError("x"), ZeroDivisionError("x"), KeyError("x"), EOFError()]
)
def test_any_error_of_a_decoder_is_a_broken_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    images = jpeg(0), encoded(picture(0), "PNG")
    monkeypatch.setattr(module.turbojpeg, "library", lambda: None)
    monkeypatch.setattr(PIL.Image.Image, "convert", fail)
    for data in images:
        for ask in (decode_exact, lambda data: EncodedImage(data).whole()):
            with pytest.raises(BrokenImage, match="broken image: "):
                ask(data)
    monkeypatch.setattr(PIL.Image, "open", fail)
    with pytest.raises(BrokenImage):
        decode_exact(images[0])


@pytest.mark.parametrize("error", [MemoryError("16 GiB"), RuntimeError("resize"), ValueError("policy")])
def test_an_image_that_can_not_be_transformed_is_named_and_counted(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(0), "a.cls": b"0", "b.jpg": jpeg(1, 50, 50), "b.cls": b"1"})
    index = build_index(str(tmp_path / "x.tar"), progress=False)
    apply = Transform.apply

    def failing(self: Transform, image: Any, key: int = 0) -> Any:
        if image.size() == (50, 50):
            raise error
        return apply(self, image, key)

    monkeypatch.setattr(Transform, "apply", failing)
    maker = batch_maker(index, config(str(tmp_path / "x.tar")), train=True)
    batch = maker.batch(0, Rows(np.arange(2), np.zeros(2, np.int64)), 2)
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.broken == [(1, f"x.tar key 'b': {type(error).__name__}: {error}")]


def test_an_unknown_marker_is_decided_by_the_decoder() -> None:
    """FF 00 and garbage between markers are skipped by libjpeg, and were read as segments."""
    real = encoded(picture(1, 60, 60))
    for odd in (b"\xff\x00", b"\xff\x02\x00\x04\x00\x00", b"\x12\x34", b"\xff\xd8"):
        found = real[:20] + odd + real[20:]
        assert frame(found)[:2] in ((0, 0), (60, 60)) and isinstance(PIL.Image.open(io.BytesIO(real)), PIL.Image.Image)
        try:
            assert tuple(EncodedImage(found).whole().shape) == (3, 60, 60)
        except BrokenImage:
            continue
