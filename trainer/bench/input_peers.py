"""The other loaders of `trilevel bench input`, each set up as in its own README or reference script.

A peer gets the same images, crop (random resized, bicubic, antialiased, flip), output size, batch and workers, and keeps its
workers between passes if it can. Libraries are imported when a peer is created; a missing one gets a row "not installed".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.augment import turbojpeg
from trainer.data.augment.decode import decode
from trainer.data.augment.policy import ops_of, posterized
from trainer.data.loader.workers import Loader
from trainer.data.shards.index import Index
from trainer.data.shards.reader import Reader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOT_INSTALLED = "not installed"


class PeerInput(NamedTuple):
    """The same images in the formats that the loaders need. shards: pattern of tars; folder: CLASS/KEY.EXTENSION; index: of shards."""

    shards: str
    folder: Path
    index: Index
    size: int
    batch: int
    workers: int


def _nothing() -> None: ...


class Peer(NamedTuple):
    """One row. did: description. epoch: one pass, returns the number of images; None if the library is not installed. prepare: runs
    before a pass, not timed."""

    did: str
    epoch: Callable[[], int] | None
    prepare: Callable[[], None] = _nothing


def bare_decode(place: PeerInput) -> Peer:
    """Decoding alone: bytes -> pixels of the whole image, which are not sent to the main process."""
    loader = _loader(_Bare(place.index, place.batch), place.workers, batch_size=None, shuffle=True)
    decoder = "TurboJPEG" if turbojpeg.library() else "PIL"
    return Peer(f"read from the shards, {decoder} of the whole image, discarded in the worker", lambda: sum(loader))


class _Bare(Dataset[int]):
    def __init__(self, index: Index, batch: int) -> None:
        self._index, self._reader, self._batch = index, Reader(index), batch

    def __len__(self) -> int:
        return len(self._index) // self._batch

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(number)
        ids = torch.arange(number * self._batch, (number + 1) * self._batch).numpy()
        return sum(decode(data).shape[0] == 3 for data in self._reader.read(ids) if isinstance(data, memoryview))


def imagefolder(place: PeerInput) -> Peer:
    from torchvision.datasets import ImageFolder

    loader = _loader(
        ImageFolder(str(place.folder), _torchvision(place.size)), place.workers, batch_size=place.batch, shuffle=True
    )
    return Peer(
        "torchvision ImageFolder (PIL), transforms as in its ImageNet example, float32, normalised on the host", _count(loader)
    )


def webdataset(place: PeerInput) -> Peer:
    wds: Any = importlib.import_module("webdataset")  # measured here as a peer; our own use of it is in trainer.data

    files = [os.path.join(place.index.root, name) for name in place.index.names]
    data = (
        wds.WebDataset(files, shardshuffle=len(files), empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(_torchvision(place.size), int)
        .batched(place.batch)
    )
    loader = wds.WebLoader(data, batch_size=None, num_workers=place.workers, persistent_workers=place.workers > 0)
    return Peer("webdataset as its README: decode('pil'), torchvision transforms, batched in the worker", _count(loader))


def timm(place: PeerInput, policy: str | None = None) -> Peer:
    from timm.data.dataset import ImageDataset
    from timm.data.loader import create_loader

    data: Any = ImageDataset(str(place.folder))
    loader: Any = create_loader(
        data, (3, place.size, place.size), place.batch, is_training=True, color_jitter=0.0,
        auto_augment=policy, interpolation="bicubic", num_workers=place.workers, device=torch.device("cpu"),
        persistent_workers=place.workers > 0,
    )  # fmt: skip
    work = "timm create_loader (PIL, create_transform, fast_collate), uint8; without normalisation on the device, as ours"
    if policy is not None:
        for step in data.transform.transforms:
            for op in ops_of(step) if hasattr(step, "ops") else []:
                if op.aug_fn.__name__ == "posterize":
                    op.aug_fn = posterized
        work += f"; {policy}; its posterize, which raises at 0 bits with Pillow 13, returns a black image there, as ours"
    inner = loader.loader if hasattr(loader, "loader") else loader
    return Peer(work, _count(inner))


def mosaicml_streaming(place: PeerInput) -> Peer:
    if importlib.util.find_spec("streaming") is None:
        return Peer(NOT_INSTALLED, None)
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    out = place.folder.parent / "mds"
    with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        for data, label in _raw(place):
            writer.write({"image": data, "label": label})
    data = StreamingDataset(local=str(out), shuffle=True, batch_size=place.batch)
    loader = _loader(_Decoded(data, "image", place.size), place.workers, batch_size=place.batch)
    return Peer("mosaicml-streaming StreamingDataset of JPEG bytes, PIL, torchvision transforms", _count(loader))


def litdata(place: PeerInput) -> Peer:
    if importlib.util.find_spec("litdata") is None:
        return Peer(NOT_INSTALLED, None)
    from litdata import StreamingDataset, optimize  # pyright: ignore[reportMissingImports]

    out = place.folder.parent / "litdata"
    rows = [{"image": data, "label": label} for data, label in _raw(place)]
    optimize(_same, rows, str(out), num_workers=1, chunk_bytes="16MB")
    data = StreamingDataset(str(out), shuffle=True)
    loader = _loader(_Decoded(data, "image", place.size), place.workers, batch_size=place.batch)
    return Peer("litdata StreamingDataset of JPEG bytes, PIL, torchvision transforms", _count(loader))


PEERS: dict[str, Callable[[PeerInput], Peer]] = {
    "bare_decode": bare_decode,
    "webdataset": webdataset,
    "imagefolder": imagefolder,
    "timm": timm,
    "mosaicml_streaming": mosaicml_streaming,
    "litdata": litdata,
}


class _Decoded(Dataset[Any]):
    """Rows of a peer's data set with `field` as JPEG bytes -> (image, label)."""

    def __init__(self, data: Any, field: str, size: int) -> None:
        self._data, self._field, self._transform = data, field, _torchvision(size)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> Any:
        import io

        import PIL.Image

        row = self._data[number]
        return self._transform(PIL.Image.open(io.BytesIO(row[self._field])).convert("RGB")), row["label"]


def _same(row: Any) -> Any:
    return row


def _raw(place: PeerInput) -> Iterable[tuple[bytes, int]]:
    reader = Reader(place.index)
    for number, label in enumerate(place.index.labels):
        data = reader.read(torch.tensor([number]).numpy())[0]
        if isinstance(data, memoryview):
            yield bytes(data), int(label)


def _torchvision(size: int) -> Callable[[Any], Any]:
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([T.Lambda(_rgb), crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def _rgb(image: Any) -> Any:
    return image.convert("RGB")


def _loader(data: Dataset[Any], workers: int, **settings: Any) -> DataLoader[Any]:
    return Loader(data, workers, **settings)


def _count(loader: Iterable[Any]) -> Callable[[], int]:
    return lambda: sum(len(batch[0]) for batch in loader)
