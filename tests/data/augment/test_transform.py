"""What is done to one image: the same wherever it is done, with timm's distributions; evaluation is timm's pixels."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from tests.support.images import encoded, jpeg, picture
from trainer.config.schema import AugmentConfig
from trainer.data.augment.decode import MAX_PIXELS, EncodedImage, decode, decode_exact
from trainer.data.augment.transform import AugmentedImage, Transform, _erase, _resized_crop
from trainer.data.keyed_hash import row_keys

KEYS = [int(k) for k in row_keys(0, 0, np.arange(300), np.zeros(300, np.int64))]


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def pixels(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_exif(seed: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(seed), exif=exif)


def palette(seed: int) -> bytes:
    return encoded(picture(seed).quantize(16), "PNG", transparency=0)


ODD = {
    "JPEG": jpeg(0),
    "grey JPEG": encoded(picture(1, mode="L")),
    "CMYK JPEG": encoded(picture(2, mode="CMYK")),
    "progressive JPEG": encoded(picture(3), progressive=True),
    "4:4:4 JPEG": encoded(picture(4), subsampling=0),
    "EXIF-turned JPEG": with_exif(5),
    "PNG": encoded(picture(6), "PNG"),
    "grey PNG": encoded(picture(6, mode="L"), "PNG"),
    "RGBA PNG": encoded(picture(7, mode="RGBA"), "PNG"),
    "palette PNG": palette(8),
    "WebP": encoded(picture(9), "WEBP"),
    "GIF": encoded(picture(10), "GIF"),
    "1 x 1": encoded(picture(11, 1, 1)),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_decodes_as_pil_does(kind: str) -> None:
    fast, exact = decode(view(ODD[kind])), pixels(PIL.Image.open(io.BytesIO(ODD[kind])).convert("RGB"))
    assert fast.shape == exact.shape and fast.dtype == torch.uint8
    assert (fast.int() - exact.int()).abs().max() <= 1, "both use libjpeg-turbo; versions differ by rounding at most"
    assert torch.equal(pixels(decode_exact(ODD[kind])), exact)


def bomb(kind: str) -> bytes:
    if kind == "PNG":
        return encoded(PIL.Image.new("1", (20_000, 20_000)), "PNG")
    data = bytearray(jpeg(0))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (50_000).to_bytes(2, "big") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decompression_bombs_are_refused_before_decoding(kind: str) -> None:
    data = bomb(kind)
    assert len(data) < 100_000 and MAX_PIXELS < 20_000**2
    for work in (decode, decode_exact):
        with pytest.raises(ValueError, match=r"bomb"):
            work(view(data))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0hello", b"no image at all", jpeg(0)[:400], ODD["PNG"][:200], ODD["WebP"][:90]]
)
def test_broken_images_are_a_value_error(data: bytes) -> None:
    for work in (decode, decode_exact):
        with pytest.raises(ValueError, match=r"no image|broken image"):
            work(view(data))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (24, 1.0), (224, 0.9)])
@pytest.mark.parametrize("kind", ["JPEG", "grey PNG", "EXIF-turned JPEG", "CMYK JPEG"])
def test_evaluation_is_timms_pixel_for_pixel(kind: str, size: int, crop_pct: float, interpolation: str) -> None:
    ours = Transform(AugmentConfig(interpolation=interpolation), size, train=False, crop_pct=crop_pct)(view(ODD[kind]))  # pyright: ignore
    theirs = timm.data.create_transform(size, interpolation=interpolation, crop_pct=crop_pct, normalize=False)  # pyright: ignore
    assert torch.equal(ours.pixels, theirs(PIL.Image.open(io.BytesIO(ODD[kind])).convert("RGB")))  # pyright: ignore
    assert not ours.flip and ours.erase == (0, 0, 0, 0)


POLICIES = ("none", "three_augment", "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "v0")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("crop", ["rrc", "src", "shift", "none"])
def test_one_key_one_image_whatever_else_draws(crop: str, policy: str) -> None:
    augment = AugmentConfig(crop=crop, shift=3, policy=policy, color_jitter=0.3, erasing=0.5)  # pyright: ignore[reportArgumentType]
    transform = Transform(augment, 32, train=True)
    data = view(jpeg(0))
    first = [transform(data, key) for key in KEYS[:6]]
    random.seed(99)
    np.random.seed(99)
    before = random.getstate()[1], np.random.get_state()[1]
    again = [Transform(augment, 32, train=True)(data, key) for key in KEYS[5::-1]][::-1]
    assert (random.getstate()[1], True) == (before[0], (np.random.get_state()[1] == before[1]).all()), "global state untouched"
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]
        assert a.pixels.shape == (3, 32, 32) and a.pixels.dtype == torch.uint8
    if (crop, policy) != ("none", "none"):
        assert len({a.pixels.numpy().tobytes() for a in first}) > 3, "another key, another image"


def test_draws_depend_on_each_of_seed_epoch_example_copy() -> None:
    base = row_keys(1, 2, np.array([3]), np.array([4]))[0]
    others = [row_keys(0, 2, np.array([3]), np.array([4])), row_keys(1, 0, np.array([3]), np.array([4]))]
    others += [row_keys(1, 2, np.array([0]), np.array([4])), row_keys(1, 2, np.array([3]), np.array([0]))]
    assert len({int(base), *(int(o[0]) for o in others)}) == 5


def spread(boxes: list[tuple[int, ...]]) -> np.ndarray:
    return np.quantile(np.array(boxes), [0.1, 0.3, 0.5, 0.7, 0.9], axis=0)


def test_crops_are_distributed_as_timms() -> None:
    state = random.getstate()
    random.seed(0)
    for width, height in ((120, 90), (400, 20)):  # the second mostly takes the fallback after ten tries
        image = PIL.Image.new("RGB", (width, height))
        theirs = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
        ours = [_resized_crop(random.Random(i), height, width, (0.08, 1.0), (3 / 4, 4 / 3)) for i in range(4000)]
        assert np.abs(spread(ours) - spread(theirs)).max() <= 0.05 * max(width, height)
        assert all(min(y, x) >= 0 and y + h <= height and x + w <= width for y, x, h, w in ours)
    random.setstate(state)


def test_erasing_is_distributed_as_timms() -> None:
    state = random.getstate()
    random.seed(0)
    eraser, theirs = RandomErasing(probability=1.0, mode="const", device="cpu"), []
    for _ in range(1500):
        hole = eraser(torch.ones(1, 64, 64))[0] == 0
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        theirs.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    random.setstate(state)
    ours = [_erase(random.Random(i), 64) for i in range(1500)]
    assert np.abs(spread(ours) - spread(theirs)).max() <= 4
    transform = Transform(AugmentConfig(erasing=0.25, flip=0.3), 32, train=True)
    images = [transform.apply(EncodedImage.of(torch.zeros(3, 40, 40, dtype=torch.uint8)), key) for key in KEYS]
    assert 0.15 < np.mean([i.erase[2] > 0 for i in images]) < 0.35
    assert 0.2 < np.mean([i.flip for i in images]) < 0.4


def test_the_fast_crop_is_pils_to_rounding() -> None:
    """decode + crop + resize on uint8 tensors against PIL's, as timm does it: reported error, bounded."""
    transform, worst, mean = Transform(AugmentConfig(), 32, train=True), 0, []
    for seed in range(20):
        data = jpeg(seed, 200, 150)
        ours = transform(view(data), KEYS[seed]).pixels
        rng = random.Random(KEYS[seed])
        rng.random(), rng.random()  # flip, erasing
        top, left, height, width = _resized_crop(rng, 150, 200, (0.08, 1.0), (3 / 4, 4 / 3))
        box = PIL.Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        error = (ours.int() - pixels(box.resize((32, 32), PIL.Image.Resampling.BICUBIC)).int()).abs()
        worst, mean = max(worst, int(error.max())), [*mean, error.float().mean().item()]
    print(f"pixel error against PIL: mean {np.mean(mean):.4f}, worst {worst} of 255")
    assert worst <= 2 and np.mean(mean) < 0.1


def test_shift_moves_and_fills_with_black() -> None:
    transform = Transform(AugmentConfig(crop="shift", shift=4), 16, train=True)
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    moves = set()
    for key in KEYS:
        out = transform.apply(EncodedImage.of(white), key).pixels
        rows, columns = (out[0] > 0).any(1).nonzero(), (out[0] > 0).any(0).nonzero()
        moves.add((16 - len(rows), 16 - len(columns)))
        assert set(out.unique().tolist()) <= {0, 255}
    assert {m for m, _ in moves} == {m for _, m in moves} == set(range(5))


def test_simple_random_crop_mirrors_the_border() -> None:
    transform = Transform(AugmentConfig(crop="src"), 16, train=True)
    ramp = torch.arange(16, dtype=torch.uint8).repeat(3, 16, 1) * 10
    mirrored = np.pad(ramp[0, 0].numpy(), 4, mode="reflect").tolist()
    found = set()
    for key in KEYS:
        row = transform.apply(EncodedImage.of(ramp), key).pixels[0, 0].tolist()
        found.add(next(i for i in range(9) if mirrored[i : i + 16] == row))
    assert found == set(range(9))


def test_color_jitter_stays_out_beside_randaugment_as_in_timm() -> None:
    def images(policy: str, jitter: float) -> list[AugmentedImage]:
        transform = Transform(AugmentConfig(policy=policy, color_jitter=jitter), 32, train=True)
        return [transform(view(jpeg(0)), key) for key in KEYS[:5]]

    for policy, changes in (("none", True), ("three_augment", True), ("rand-m9-mstd0.5-inc1", False)):
        same = [torch.equal(a.pixels, b.pixels) for a, b in zip(images(policy, 0.0), images(policy, 0.4), strict=True)]
        assert all(same) != changes


def test_posterizing_to_no_bits_is_black_as_timm_means_it() -> None:
    """Pillow 13 refuses 0 bits, which timm passes: an image must not count as broken for that."""
    transform = Transform(AugmentConfig(policy="rand-m10-n1-inc1-t1"), 32, train=True)
    black = [transform(view(jpeg(0)), key).pixels.max() == 0 for key in KEYS]
    assert 0 < sum(black) < 60


def test_an_unknown_policy_is_refused() -> None:
    for policy in ("randd", "nonsense", "rand-q9", "rand-m9-mstd", "rand-m9-zzz"):
        with pytest.raises(ValueError, match=r"augment.policy="):
            Transform(AugmentConfig(policy=policy), 32, train=True)


@pytest.mark.skipif("TRILEVEL_IMAGENET_TAR" not in os.environ, reason="TRILEVEL_IMAGENET_TAR names no tar of ImageNet images")
def test_real_images_decode_as_pil_does() -> None:
    with tarfile.open(Path(os.environ["TRILEVEL_IMAGENET_TAR"])) as tar:
        files = [m for m in tar.getmembers() if m.isfile()][:200]
        for member in files:
            data = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
            fast, exact = decode(view(data)), pixels(decode_exact(data))
            assert (fast.int() - exact.int()).abs().max() <= 1, member.name
