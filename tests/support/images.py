"""Images the tests draw themselves, and sources and configurations made of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from trainer.config.load import parse
from trainer.config.run_config import Config


def picture(seed: int, width: int = 48, height: int = 40, mode: str = "RGB") -> PIL.Image.Image:
    """Smooth blobs and a sharp corner: no two seeds alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
    image.paste((255, 0, 0), (0, 0, max(2, width // 6), max(2, height // 6)))
    return image.convert(mode)


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def jpeg(seed: int, width: int = 48, height: int = 40) -> bytes:
    return encoded(picture(seed, width, height))


def without_tables(data: bytes) -> bytes:
    """A JPEG whose markers are in order and which no decoder can decode: its quantisation is missing."""
    while (at := data.find(b"\xff\xdb")) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return data


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], *, classes: int = 4, stem: str = "train", broken: Collection[int] = ()) -> str:
    """Foreign shards with .cls labels, example i of class i % classes, those in `broken` no images; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    i = 0
    for number, size in enumerate(sizes):
        files = {}
        for _ in range(size):
            data = b"no image" if i in broken else jpeg(i)
            files |= {f"img{i:05d}.jpg": data, f"img{i:05d}.cls": str(i % classes).encode()}
            i += 1
        write_tar(folder / f"{stem}-{number:04d}.tar", files)
    return str(folder / f"{stem}-*.tar")


def config(pattern: str, *, classes: int = 4, image_size: int = 32, **sections: Any) -> Config:
    data = {"train": pattern, "validation": pattern, "batch": 12, "micro_batch": 6, "lanes": 2, "window": 8, "workers": 0}
    return parse(
        {
            "name": "drawn",
            "epochs": 10,
            "model": {"name": "vit_tiny_patch16_224", "classes": classes, "image_size": image_size},
            "data": data | sections.pop("data", {}),
            **sections,
        }
    )
