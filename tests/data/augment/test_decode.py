"""A box of a JPEG decoded by itself: the pixels and the verdict of the whole image, with TurboJPEG and without."""

from __future__ import annotations

import ctypes
import io
import os
import tarfile
import threading
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support.images import encoded, picture
from trainer.data.augment import decode as module
from trainer.data.augment import turbojpeg
from trainer.data.augment.decode import BrokenImage, EncodedImage, as_tensor, decode, decode_exact, frame, is_plain_scan

SAMPLE = os.environ.get("TRILEVEL_IMAGENET_TAR", "")  # a tar of photographs, as for test_transform
needs_turbo = pytest.mark.skipif(turbojpeg.library() is None, reason="no TurboJPEG >= 3 on this machine")
Box = tuple[int, int, int, int]


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def noisy(seed: int, width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    """Noise over the drawn picture: every pixel and every sample of colour matters."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.blend(picture(seed, width, height), PIL.Image.fromarray(noise), 0.4).convert(mode)


def compressed(image: PIL.Image.Image, subsampling: int) -> bytes:
    """By TurboJPEG itself, which writes 4:4:0 (4) and 4:1:1 (5) as well."""
    library = turbojpeg.library()
    library.tj3Compress8.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_void_p, ctypes.c_void_p]
    library.tj3Free.argtypes = [ctypes.c_void_p]
    handle = library.tj3Init(0)
    try:
        for parameter, value in ((3, 85), (4, subsampling)):  # TJPARAM_QUALITY, _SUBSAMP
            assert library.tj3Set(handle, parameter, value) == 0
        pixels, out, size = np.array(image), ctypes.c_void_p(), ctypes.c_size_t()
        width, height = image.size
        done = library.tj3Compress8(handle, pixels.ctypes.data, width, 0, height, 0, ctypes.byref(out), ctypes.byref(size))
        assert done == 0
        data = ctypes.string_at(out, size.value)
        library.tj3Free(out)
        return data
    finally:
        library.tj3Destroy(handle)


def boxes(seed: int, width: int, height: int, number: int) -> Iterator[Box]:
    """The whole, narrow ones at every place of every edge, and drawn ones."""
    yield 0, 0, height, width
    for side in (1, 2, 3):
        for left in range(width - side + 1):
            yield 0, left, min(side, height), side
            yield height - 1, left, 1, side
        for top in range(height - side + 1):
            yield top, width - 1, side, 1
    rng = np.random.default_rng(seed)
    for top, left in zip(rng.integers(0, height, number).tolist(), rng.integers(0, width, number).tolist(), strict=True):
        yield top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


SIZES = ((1, 1), (7, 5), (16, 16), (18, 9), (33, 50), (66, 20))
KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:2:0, restarts": {"subsampling": 2, "restart_marker_blocks": 3},
    "4:2:0, EXIF": {"subsampling": 2, "exif": b"Exif\0\0" + bytes(400)},
    "4:2:0, progressive": {"subsampling": 2, "progressive": True},
    "grey": {"mode": "L"},
    "RGB inside": {"keep_rgb": True, "subsampling": 0},
    "4:4:0": 4,
    "4:1:1": 5,
}


@needs_turbo
@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_the_same_part_of_the_whole(kind: str) -> None:
    options, cut = KINDS[kind], 0
    for number, (width, height) in enumerate(SIZES):
        if isinstance(options, int):
            data = view(compressed(noisy(number, width, height), options))
        else:
            how = dict(options)
            data = view(encoded(noisy(number, width, height, how.pop("mode", "RGB")), quality=70 + 4 * number, **how))
        whole = np.array(decode_exact(data))
        assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), whole) and whole.shape == (height, width, 3)
        assert is_plain_scan(data, frame(data)) != ("progressive" in kind)
        for top, left, high, wide in boxes(number, width, height, 25):
            pixels = turbojpeg.cut(data, (top, left, high, wide))
            assert pixels is not None, "TurboJPEG fails or warns"
            cut += pixels is not None
            part = whole[top : top + high, left : left + wide]
            assert np.array_equal(pixels, part), (kind, width, height, (top, left, high, wide))
            assert torch.equal(EncodedImage(data).box(top, left, high, wide), torch.from_numpy(part).permute(2, 0, 1))
    assert cut > 1000


def test_the_header_of_a_jpeg_is_read_as_it_is() -> None:
    """An id of a component, which is 1 in most files, taken for their number would send CMYK to the decoder of RGB."""
    for mode, channels in (("L", 1), ("RGB", 3), ("CMYK", 4)):
        data = encoded(PIL.Image.new(mode, (40, 24)))
        assert frame(data)[:3] == (24, 40, channels), mode


@pytest.mark.parametrize("kind", ["CMYK", "PNG", "progressive"])
def test_other_images_are_decoded_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noisy(1, 40, 30)
    data = {
        "CMYK": encoded(image.convert("CMYK")),
        "PNG": encoded(image, "PNG"),
        "progressive": encoded(image, progressive=True),
    }[kind]
    asked: list[Box] = []
    monkeypatch.setattr(turbojpeg, "cut", lambda _, box, size=None: asked.append(box))
    assert torch.equal(EncodedImage(view(data)).box(3, 5, 20, 30), decode(view(data))[:, 3:23, 5:35])
    assert set(asked) == ({(0, 0, 30, 40)} if kind == "progressive" else set())
    assert EncodedImage(view(data)).size() == (30, 40)


def verdict(data: bytes, box: Box) -> tuple[str, bytes]:
    """("", pixels), or what is wrong."""
    try:
        return "", EncodedImage(view(data)).box(*box).numpy().tobytes()
    except BrokenImage as error:
        return str(error), b""


def spoilt(data: bytes) -> Iterator[bytes]:
    """Cut short at many places, with and without an end mark; single bytes changed; pieces left out; markers put in; a tail."""
    rng, length = np.random.default_rng(0), len(data)
    for at in [*range(2, 40), *rng.integers(40, length, 60).tolist(), *range(length - 12, length)]:
        yield data[:at]
        yield data[:at] + b"\xff\xd9"
    for at, value in zip(rng.integers(2, length, 250).tolist(), rng.integers(0, 256, 250).tolist(), strict=True):
        yield data[:at] + bytes([value]) + data[at + 1 :]
    for at, size in zip(rng.integers(600, length, 60).tolist(), rng.integers(1, 200, 60).tolist(), strict=True):
        yield data[:at] + data[at + size :]
    for kind in (0x00, 0x01, 0xC0, 0xC4, 0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE, 0xFF):
        for at in rng.integers(length // 2, length - 2, 5).tolist():
            yield data[:at] + bytes([0xFF, kind]) + data[at + 2 :]
    yield data + b"tail"
    yield data + data


@needs_turbo
@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_blocks": 2}, {"progressive": True}], ids=["plain", "restarts", "progressive"]
)
def test_the_verdict_does_not_depend_on_the_library(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(noisy(3, 90, 70), quality=60, **options)
    cases, places = (
        [good, *spoilt(good)],
        [(0, 0, 8, 90), (20, 30, 17, 40), (60, 1, 10, 50)],
    )  # most of it follows the first
    cut: list[bool] = []
    ask = turbojpeg.cut
    monkeypatch.setattr(turbojpeg, "cut", lambda *a: (found := ask(*a), cut.append(found is not None))[0])
    ours = [verdict(data, box) for data in cases for box in places]
    monkeypatch.setattr(turbojpeg, "cut", lambda *_: None)
    theirs = [verdict(data, box) for data in cases for box in places]
    different = [(i // 3, i % 3, a[0], b[0]) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    assert not different, different[:5]
    assert 50 < sum(bool(message) for message, _ in theirs) < len(theirs) - 50, "some are broken, some are not"
    assert "progressive" in options or (len(set(cut)) == 2 and sum(cut) > 20), (
        "the library was called, and its answer sometimes checked by PIL"
    )


@needs_turbo
def test_threads_decode_beside_each_other() -> None:
    data = [view(encoded(noisy(i, 80 + i, 60), quality=80)) for i in range(6)]
    expected = [decode(d)[:, 5:45, 7:67] for d in data]
    found: list[bool] = []

    def work() -> None:
        cut = [turbojpeg.cut(d, (5, 7, 40, 60)) for _ in range(20) for d in data]
        found.extend(np.array_equal(f, e.permute(1, 2, 0)) for f, e in zip(cut, expected * 20, strict=True))  # pyright: ignore

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 20 * 6 and all(found)


@needs_turbo
@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc4"])
def test_an_image_without_its_tables_does_not_get_those_of_the_image_before(marker: bytes) -> None:
    """A decompressor keeps its tables: such an image was broken or not, by what its worker had decoded before."""
    data = encoded(noisy(1, 80, 60), quality=80)
    while (at := data.find(marker)) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    first = turbojpeg.cut(view(data), (0, 0, 60, 80))
    assert turbojpeg.cut(view(encoded(noisy(2, 80, 60), quality=5)), (0, 0, 60, 80)) is not None
    again = turbojpeg.cut(view(data), (0, 0, 60, 80))
    assert (first is None and again is None) or np.array_equal(first, again)  # pyright: ignore[reportArgumentType]


def test_without_the_library_everything_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "_places", lambda: ["/no/such/library.so", "libc.so.6"])
    turbojpeg.library.cache_clear()
    try:
        data = view(encoded(noisy(2, 50, 40)))
        assert turbojpeg.library() is None and turbojpeg.cut(data, (0, 0, 9, 9)) is None
        assert torch.equal(EncodedImage(data).box(3, 4, 20, 30), decode(data)[:, 3:23, 4:34])
    finally:
        monkeypatch.undo()
        turbojpeg.library.cache_clear()


@needs_turbo
@pytest.mark.skipif(not SAMPLE, reason="TRILEVEL_IMAGENET_TAR names no tar of ImageNet images")
def test_photographs_too() -> None:
    rng, asked = np.random.default_rng(0), 0
    with tarfile.open(SAMPLE) as tar:
        for member in [m for m in tar if m.isfile()][:40]:
            data = view(tar.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
            whole = decode(data)
            height, width = whole.shape[1:]
            assert EncodedImage(data).size() == (height, width)
            top, left = int(rng.integers(height)), int(rng.integers(width))
            high, wide = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
            asked += turbojpeg.cut(data, (top, left, high, wide)) is not None and is_plain_scan(data, module.frame(data))
            assert torch.equal(EncodedImage(data).box(top, left, high, wide), whole[:, top : top + high, left : left + wide])
    assert asked > 30


def test_only_formats_of_photographs_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's plugin for EPS would start Ghostscript on whatever a shard holds."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    for read in (decode, decode_exact):
        with pytest.raises(BrokenImage, match="no image"):
            read(eps)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped_to_white(form: str):
    """PIL's own conversion makes 255 of 3000, of 65,535."""
    values = np.array([[0, 255, 3000], [32768, 65280, 65535]], dtype=np.uint16)
    if form == "PPM":
        data = b"P5 3 2 65535\n" + values.astype(">u2").tobytes()
    else:
        PIL.Image.fromarray(values).save(file := io.BytesIO(), form)
        data = file.getvalue()
    for pixels in (as_tensor(decode_exact(data)), decode(data)):
        assert pixels.tolist() == [(values >> 8).tolist()] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_of_unknown_range_are_a_broken_image(kind: type):
    PIL.Image.fromarray(np.full((8, 8), 1000, kind)).save(file := io.BytesIO(), "TIFF")
    with pytest.raises(BrokenImage, match="32 bits per channel, of unknown range: convert it to 8 or 16 bits"):
        decode(file.getvalue())
