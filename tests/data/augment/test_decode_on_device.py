"""`data.decode_on: device`: the batches are those of the workers, whichever images the device may decode and however it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._triton import has_triton_package

from tests.conftest import ROOT, environment
from tests.support.images import config, encoded, jpeg, picture, without_tables, write_shards, write_tar
from trainer.config.errors import ConfigError
from trainer.data.augment import decode_on_device
from trainer.data.augment.decode import BrokenImage, decode
from trainer.data.augment.decode_on_device import DeviceDecoder
from trainer.data.augment.device_jpeg import MAX_PIXELS, for_device, row_bytes
from trainer.data.batch import Batch
from trainer.data.errors import DataError
from trainer.data.loader import decoded_ahead
from trainer.data.loader.build import batch_maker, training_stream
from trainer.data.loader.decoded_ahead import AHEAD, DecodedAhead
from trainer.data.order import Rows
from trainer.data.shards.index import Index, build_index

LEFT = {0, 1, 2, 8, 9, 10, 12, 13}  # of `mixed`, to the device
AUGMENT = {"erasing": 0.5, "policy": "rand-m9-mstd0.5-inc1", "policy_on": "device"}


def exif(orientation: int) -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


def cut_short(data: bytes) -> bytes:
    """A JPEG with half of its scan: decoders warn, and fill the rest."""
    return data[: len(data) * 2 // 3].rstrip(b"\xff") + b"\xff\xd9"


def mixed(folder: Path) -> Index:
    """Images for the device (plain, turned by EXIF, cut short, damaged) and for the workers (grey, progressive, PNG, CMYK, too many bytes,
    no image)."""
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8))
    kinds = [
        jpeg(0), encoded(picture(1), exif=exif(6)), without_tables(jpeg(2)), encoded(picture(3, mode="L")),
        encoded(picture(4), progressive=True),
        encoded(picture(5), "PNG"), encoded(noise), b"no image", cut_short(jpeg(8)), jpeg(9, 30, 41), encoded(picture(10), subsampling=0),
        encoded(picture(11, mode="CMYK")), jpeg(12, 20, 20), jpeg(13),
    ]  # fmt: skip
    files = {f"i{i:02d}.{'cls' if label else 'jpg'}": b"%d" % (i % 4) if label else data
             for i, data in enumerate(kinds) for label in (False, True)}  # fmt: skip
    folder.mkdir()
    write_tar(folder / "train-0000.tar", files)
    return build_index(str(folder / "train-*.tar"), progress=False)


def epochs(index: Index, where: str, world: int = 1, **data: Any) -> list[Batch]:
    """The batches of all ranks in three epochs, each of which shows 12 of 14 images."""
    settings: Any = {"augment": AUGMENT, "data": {"decode_on": where, "batch": 4, "micro_batch": 4} | data}
    sections = config("x", **settings)
    streams = [training_stream(index, sections, rank, world) for rank in range(world)]
    return [batch for stream in streams for number in range(3) for batch in stream.epoch(number, None)]


@pytest.mark.parametrize(("world", "more"), [(1, {}), (2, {}), (1, {"repeats": 2}), (1, {"workers": 2})])
def test_batches_are_those_of_the_workers(tmp_path: Path, world: int, more: dict[str, Any]) -> None:
    index = mixed(tmp_path / "shards")
    ours, theirs = (epochs(index, where, world, **more) for where in ("device", "workers"))
    broken = set()
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(getattr(mine, f), getattr(other, f)) for f in Batch._fields if f != "broken")
        assert [*map(tuple, mine.broken)] == [*map(tuple, other.broken)]
        broken |= {example for example, _ in mine.broken}
    assert broken == {2, 7}


def test_crops_that_are_reduced_too_much_are_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainer.data.augment.transform.MAX_REDUCTION", 1
    )  # of 32 px: the crops of 48 x 40 pixels on both sides of it
    index = build_index(write_shards(tmp_path / "shards", [14]), progress=False)
    maker = batch_maker(index, config("x", augment=AUGMENT), train=True, on_device=True)
    ids = np.arange(14)
    left = (maker.batch(0, Rows(ids, 0 * ids), 14).jpeg[:, 0] > 0).sum()
    assert 0 < left < 14
    for mine, other in zip(epochs(index, "device"), epochs(index, "workers"), strict=True):
        assert all(torch.equal(getattr(mine, f), getattr(other, f)) for f in Batch._fields if f != "broken")


def test_most_images_are_left_to_the_device(tmp_path: Path) -> None:
    index = mixed(tmp_path / "shards")
    maker = batch_maker(index, config("x", augment=AUGMENT), train=True, on_device=True)
    ids = np.arange(len(index))
    assert (maker.batch(0, Rows(ids, 0 * ids), len(ids)).jpeg[:, 0] > 0).tolist() == [i in LEFT for i in ids]


def test_metadata_is_left_out_and_the_picture_stays() -> None:
    data = encoded(picture(0), exif=exif(6), comment=b"x" * 500, icc_profile=b"y" * 700)
    found = for_device(memoryview(data))
    assert found is not None and len(found.data) < len(data) - 1200 and b"Exif" not in found.data.tobytes()
    assert torch.equal(decode(found.data.tobytes()), decode(data)) and (found.height, found.width) == (40, 48)


def rgb(data: bytes) -> bytes:
    """With Adobe's marker for colours that are not YCbCr."""
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + data[2:]


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(0, mode="L")), encoded(picture(0), progressive=True), encoded(picture(0), "PNG"), rgb(jpeg(0)), jpeg(0)[:-2],
        jpeg(0) + b"more", encoded(picture(0, mode="CMYK")), b"", b"\xff\xd8", encoded(picture(0), keep_rgb=True),
    ],
)  # fmt: skip
def test_what_the_device_does_not_decode(data: bytes) -> None:
    assert for_device(memoryview(data)) is None


def test_large_images_are_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    data = memoryview(jpeg(0))
    assert for_device(data) is not None
    monkeypatch.setattr("trainer.data.augment.device_jpeg.MAX_PIXELS", 48 * 40 - 1)
    assert for_device(data) is None
    assert MAX_PIXELS > 4000 * 4000


def test_what_the_device_decodes_depends_on_the_file_alone(tmp_path: Path) -> None:
    """Its pixels are not the workers' on a GPU, so the choice may not follow ranks, batches or copies."""
    index = mixed(tmp_path / "shards")
    found: dict[int, set[bool]] = {}
    for world, batch in ((1, 4), (2, 4), (1, 12), (2, 12)):
        settings: Any = {"augment": AUGMENT, "data": {"decode_on": "device", "batch": batch, "micro_batch": batch}}
        for rank in range(world):
            stream = training_stream(index, config("x", **settings), rank, world)
            stream.decode = None
            for one in (one for number in range(3) for one in stream.epoch(number, None)):
                for example, fields in zip(one.ids.tolist(), one.jpeg[:, 0].tolist(), strict=True):
                    found.setdefault(example, set()).add(fields > 0)
    assert {example for example, choices in found.items() if choices == {True}} - {-1} == LEFT
    assert all(len(choices) == 1 for choices in found.values())


def test_a_row_has_room_for_its_pixels_and_for_most_files() -> None:
    assert row_bytes(np.arange(1000), 16) == 949 and row_bytes(np.arange(10), 16) == 768


@pytest.mark.slow
@pytest.mark.skipif(not has_triton_package(), reason="Triton is not installed")
def test_the_code_for_a_gpu_is_within_one_level_of_the_hosts(tmp_path: Path) -> None:
    """Triton's interpreter in its own process: its variable must be set before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_resize", str(tmp_path / "shards")], capture_output=True, text=True, check=False,
        cwd=ROOT, env=environment() | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 13 and max(worst for worst, _ in found.values()) <= 1, found
    assert max(share for _, share in found.values()) < 0.05, found


@pytest.mark.skipif(not has_triton_package(), reason="Triton is not installed")
@pytest.mark.parametrize("cubic", [True, False])
def test_the_kernel_compiles_for_a_gpu(cubic: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.data.augment.resize_kernel import BLOCK, FIELDS, resize_kernel

    constants = {"SIZE": 224, "CUBIC": cubic, "BLOCK": BLOCK, "FIELDS": FIELDS}
    signature = {"images": "*u8", "table": "*i64", "out": "*u8"} | dict.fromkeys(constants, "constexpr")
    source: Any = ASTSource(fn=resize_kernel, signature=signature, constexprs=constants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton, about a default of its next version
        compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_torchcodec_decodes_what_it_gets() -> None:
    """Its form for the CPU, with the words of the call on a GPU: the pixels of the workers, and a RuntimeError for a damaged image."""
    decode_jpeg = decode_on_device.nvjpeg()
    data = [jpeg(0), encoded(picture(1), exif=exif(6)), encoded(picture(2), subsampling=0)]
    jpegs = [torch.from_numpy(one.data) for each in data if (one := for_device(memoryview(each)))]
    found = decode_jpeg(jpegs, mode="RGB", device=torch.device("cpu"))
    assert len(found) == 3 and all(torch.equal(one, decode(each)) for one, each in zip(found, data, strict=True))
    with pytest.raises(RuntimeError):
        decode_jpeg([jpegs[0], torch.frombuffer(bytearray(without_tables(data[0])), dtype=torch.uint8)], device="cpu")


def test_a_gpu_without_torchcodec_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ConfigError, match=r"data\.decode_on=device: TorchCodec does not load .* >= 0\.16 built for CUDA"):
        decode_on_device.nvjpeg()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"data\.decode_on=device: TorchCodec is not installed; .* pip install 'trilevel\[nvjpeg\]'"
    ):
        decode_on_device.nvjpeg()


class _Nvjpeg:
    """In nvJPEG's place, with errors as TorchCodec raises them: RuntimeError, whatever the cause. reasons: by the first byte count."""

    def __init__(self, reason: str, every: bool = False) -> None:
        self.reason, self.every, self.calls = reason, every, 0

    def __call__(self, jpegs: list[torch.Tensor], **_: Any) -> list[torch.Tensor]:
        self.calls += 1
        if self.every or any(len(one) == 5 for one in jpegs):
            raise RuntimeError(f"{self.reason}\nException raised from decode_jpegs_cuda")
        return [decode(memoryview(one.numpy())) for one in jpegs]


def of_device(found: Any) -> DeviceDecoder:
    decoder = DeviceDecoder(16, "bicubic", lambda example: f"image {example}", torch.device("cpu"))
    decoder._nvjpeg = found
    return decoder


def test_an_image_that_is_refused_is_decoded_by_the_host_and_named() -> None:
    decoder = of_device(_Nvjpeg("nvjpegDecode failed: 3"))
    good, bad = torch.frombuffer(bytearray(jpeg(0)), dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    with pytest.warns(UserWarning, match=r"image 8: refused by nvJPEG \(nvjpegDecode failed: 3\), decoded by the host"):
        found = decoder._decoded({7: (good, (40, 48)), 8: (bad, (40, 48))})
    assert isinstance(found[0], torch.Tensor) and isinstance(found[1], BrokenImage) and decoder.refused == 1


@pytest.mark.parametrize(
    ("reason", "every"), [("nvjpegDecode failed: 6", True), ("Failed to decode batch: 5", False), ("CUDA out of memory", False)]
)
def test_a_decoder_that_fails_for_another_reason_ends_the_run(reason: str, every: bool) -> None:
    """Else all images would be decoded by the host, slowly, and with other pixels."""
    decoder = of_device(_Nvjpeg(reason, every))
    with pytest.raises(DataError, match=f"data.decode_on=device: nvJPEG failed on cpu: {reason}; .*data.decode_on=workers"):
        decoder._decoded({7: (torch.zeros(5, dtype=torch.uint8), (40, 48))})


def test_a_gpu_that_nvjpeg_does_not_support_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decode_on_device, "nvjpeg", lambda: _Nvjpeg("torchcodec was not compiled with nvJPEG support", every=True)
    )
    with pytest.raises(
        ConfigError, match=r"nvJPEG does not decode on cuda:0 \(torchcodec was not compiled with nvJPEG support\)"
    ):
        DeviceDecoder(16, "bicubic", str, torch.device("cuda", 0))
    monkeypatch.setattr(decode_on_device, "nvjpeg", lambda: _Nvjpeg(""))
    assert DeviceDecoder(16, "bicubic", str, torch.device("cuda", 0))._fails() == ""


def test_few_large_pictures_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_on_device, "CHUNK", 3 * 100)
    nothing = torch.zeros(1)
    sizes = {1: (10, 5), 2: (5, 10), 3: (1, 1), 4: (99, 99), 5: (2, 2)}
    assert [*decode_on_device._chunks({one: (nothing, size) for one, size in sizes.items()})] == [[1, 2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("augment", "named"),
    [
        ({"crop": "src"}, r"data\.decode_on=device with augment\.crop=src"),
        (
            {"policy": "rand-m9-mstd0.5-inc1"},
            r"augment\.policy=rand-m9-mstd0\.5-inc1 on the workers.*augment\.policy_on=device",
        ),
        ({"color_jitter": 0.3}, r"augment\.color_jitter=0\.3 on the workers"),
    ],
)
def test_augmentation_that_needs_pixels_in_the_workers_is_refused(augment: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config("x", augment=augment, data={"decode_on": "device"})


class _Pretended:
    """A GPU's streams, and a decoder whose batches are numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int = -1) -> None:
        self.device, self.happened, self._fails_at = torch.device("cuda", 0), [], fails_at
        here = SimpleNamespace(
            Stream=lambda _: "side", stream=lambda _: _Nothing(), device=lambda _: _Nothing(), Event=lambda: _Event(self),
            current_stream=lambda _: SimpleNamespace(wait_event=lambda event: self.happened.append(f"waits for {event.number}")),
        )  # fmt: skip
        monkeypatch.setattr(decoded_ahead, "torch", SimpleNamespace(cuda=here))
        self.number = -1

    def __call__(self, number: int) -> Any:
        self.number = number
        if number == self._fails_at:
            raise ConfigError("broken")
        self.happened.append(f"decodes {number}")
        images = SimpleNamespace(device=self.device, record_stream=lambda _: self.happened.append(f"keeps {number}"))
        return SimpleNamespace(images=images, number=number)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Event:
    def __init__(self, decoder: _Pretended) -> None:
        self._decoder, self.number = decoder, -1

    def record(self, stream: str) -> None:
        assert stream == "side"
        self.number = self._decoder.number


def test_batches_are_decoded_two_ahead_in_order_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = _Pretended(monkeypatch)
    ahead, taken = DecodedAhead(lambda: decoder), []
    source: Any = (taken.append(number) or number for number in range(6))
    batches: Any = ahead(source)
    assert next(batches).number == 0 and taken == list(range(AHEAD + 1))
    assert [one.number for one in batches] == [1, 2, 3, 4, 5]
    for number in range(6):
        order = [decoder.happened.index(f"{what} {number}") for what in ("decodes", "waits for", "keeps")]
        assert order == sorted(order)


def test_an_error_of_the_decoder_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = _Pretended(monkeypatch, fails_at=2)
    batches: Any = DecodedAhead(lambda: decoder)(range(6))  # pyright: ignore[reportArgumentType]
    assert [next(batches).number, next(batches).number] == [0, 1]
    with pytest.raises(ConfigError, match="broken"):
        next(batches)


def test_an_epoch_that_is_left_ends_its_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = _Pretended(monkeypatch)
    ahead = DecodedAhead(lambda: decoder)
    for _ in range(2):
        batches: Any = ahead(range(6))  # pyright: ignore[reportArgumentType]
        assert next(batches).number == 0
        batches.close()
    assert ahead._thread is not None
    ahead._thread.shutdown()
    assert "decodes 4" not in decoder.happened


def test_the_decoder_is_made_in_the_first_epoch() -> None:
    """A process that has used the GPU cannot fork workers that do."""
    made: list[int] = []
    ahead = DecodedAhead(lambda: made.append(1) or DeviceDecoder(16, "bicubic", str, torch.device("cpu")))
    assert not made
    for _ in range(2):
        assert list(ahead([])) == []
    assert made == [1]
