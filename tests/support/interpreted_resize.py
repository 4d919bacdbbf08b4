"""The resize kernel in Triton's interpreter beside torch's resize of uint8 on the CPU, and a batch decoded as on a GPU.

TRITON_INTERPRET=1 must be set before Triton is imported, so this is a process of its own: `python -m tests.support.interpreted_resize`
prints a JSON object {case: [largest difference, share of values that differ]}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import images
from tests.support.images import config, encoded, jpeg, without_tables, write_tar
from trainer.data.augment.decode import BrokenImage, decode
from trainer.data.augment.decode_on_device import DeviceDecoder
from trainer.data.augment.resize_kernel import resized_crops
from trainer.data.augment.transform import resized
from trainer.data.loader.build import batch_maker
from trainer.data.order import Rows
from trainer.data.shards.index import build_index

SIZE = 16
CROPS = {  # height and width of an image, top, left, height, width of the crop
    "smaller": (40, 50, 0, 0, 40, 50),
    "narrow": (20, 70, 3, 5, 10, 60),
    "of its size": (16, 16, 0, 0, 16, 16),
    "larger": (9, 7, 1, 1, 8, 3),
    "much smaller": (70, 50, 2, 0, 66, 50),
    "one pixel": (5, 5, 4, 4, 1, 1),
}


def _difference(mine: Tensor, theirs: Tensor) -> list[float]:
    off = (mine.int() - theirs.int()).abs()
    return [int(off.max()), float((off > 0).float().mean())]


def crops(interpolation: str) -> dict[str, list[float]]:
    """Of noise and of black and white, in which a filter that is not cut to 0..255 between the passes shows."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w, *_ in CROPS.values()]
    pictures = [255 * (one > 127).to(torch.uint8) if place % 2 else one for place, one in enumerate(pictures)]
    begin, table = 0, []
    for row, (picture, crop) in enumerate(zip(pictures, CROPS.values(), strict=True)):
        table.append([len(CROPS) - 1 - row, begin, *crop])
        begin += picture.numel()
    out = torch.full((len(CROPS), SIZE, SIZE, 3), 7, dtype=torch.uint8)
    resized_crops(torch.cat([one.flatten() for one in pictures]), torch.tensor(table), out, interpolation)
    found = {}
    for row, (name, picture) in enumerate(zip(CROPS, pictures, strict=True)):
        _, _, top, left, height, width = CROPS[name]
        cut = picture[:, top : top + height, left : left + width]
        theirs = resized(cut.contiguous(), SIZE, SIZE, interpolation)
        found[f"{interpolation}, {name}"] = _difference(out[len(CROPS) - 1 - row].permute(2, 0, 1), theirs)
    return found


def _refusing(jpegs: list[Tensor], **_: Any) -> list[Tensor]:
    """In nvJPEG's place: a whole list fails with one image that is damaged, or 20 pixels high."""
    try:
        found = [decode(memoryview(one.numpy())).contiguous() for one in jpegs]
    except BrokenImage as error:
        raise RuntimeError("nvjpegDecode failed: 4") from error
    if any(one.shape[1] == 20 for one in found):
        raise RuntimeError("nvjpegDecode failed: 3")
    return found


def batch(folder: Path) -> dict[str, list[float]]:
    """The code for a GPU beside the host's: two plain JPEGs, one that nvJPEG refuses, one that is damaged, and one of the workers."""
    data = [jpeg(0), jpeg(1), jpeg(2, 20, 20), without_tables(jpeg(3)), encoded(images.picture(4, mode="L"))]
    files = {
        f"i{i}.{'cls' if label else 'jpg'}": b"0" if label else one for i, one in enumerate(data) for label in (False, True)
    }
    folder.mkdir()
    write_tar(folder / "train-0000.tar", files)
    index = build_index(str(folder / "train-*.tar"), progress=False)
    maker = batch_maker(index, config("x", data={"decode_on": "device"}), train=True, on_device=True)
    ids = torch.arange(len(data)).numpy()
    left, again = (maker.batch(0, Rows(ids, 0 * ids), len(ids)) for _ in range(2))
    assert (left.jpeg[:, 0] > 0).tolist() == [True, True, True, True, False]
    host, device = (DeviceDecoder(32, "bicubic", index.where, torch.device("cpu")) for _ in range(2))
    device._nvjpeg = _refusing
    theirs, mine = host(left), device(again)
    assert mine.images.shape == theirs.images.shape and mine.images.stride() == theirs.images.stride()
    assert [example for example, _ in mine.broken] == [3] and mine.broken == theirs.broken
    assert torch.equal(mine.weights, theirs.weights) and mine.jpeg.shape == theirs.jpeg.shape == (5, 0) and device.refused == 2
    return {"batch": _difference(mine.images, theirs.images)}


if __name__ == "__main__":
    import sys

    print(json.dumps(crops("bicubic") | crops("bilinear") | batch(Path(sys.argv[1]))))
