"""Data sets of drawn images in the layouts in which people have them: Tiny-ImageNet, CIFAR, ILSVRC, Kaggle, Hugging Face, webdataset."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.images import jpeg, write_tar

WNIDS = ("n01440764", "n01443537", "n01484850")
TRAIN = {f"{WNIDS[i % 3]}_{i}": (jpeg(i), WNIDS[i % 3]) for i in range(48)}  # name: (bytes, class)
VALIDATION = {f"ILSVRC2012_val_{i + 1:08d}": (jpeg(100 + i), WNIDS[(2 * i) % 3]) for i in range(24)}


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def image_folder(root: Path) -> Path:
    files = {f"train/{c}/{n}.JPEG": data for n, (data, c) in TRAIN.items()}
    return write_files(root, files | {f"val/{c}/{n}.JPEG": data for n, (data, c) in VALIDATION.items()})


def tiny_imagenet(root: Path) -> Path:
    files = {f"tiny-imagenet-200/train/{c}/images/{n}.JPEG": data for n, (data, c) in TRAIN.items()}
    files |= {f"tiny-imagenet-200/train/{c}/{c}_boxes.txt": b"x.JPEG\t0\t0\t9\t9\n" for c in WNIDS}
    files |= {f"tiny-imagenet-200/val/images/{n}.JPEG": data for n, (data, _) in VALIDATION.items()}
    lines = "".join(f"{n}.JPEG\t{c}\t0\t32\t44\t62\n" for n, (_, c) in VALIDATION.items())
    files |= {
        "tiny-imagenet-200/val/val_annotations.txt": lines.encode(),
        "tiny-imagenet-200/wnids.txt": b"\n".join(map(str.encode, WNIDS)),
    }
    return write_files(root, files | {f"tiny-imagenet-200/test/images/test_{i}.JPEG": jpeg(200 + i) for i in range(2)})


def devkit() -> dict[str, bytes]:
    """Numbers in another order than the wnids, and a class with children, as in the real one."""
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(2, WNIDS[0], "tench", 0), (3, WNIDS[1], "goldfish", 0), (1, WNIDS[2], "shark", 0), (4, "n00001740", "entity", 3)]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    number = {wnid: n for n, wnid, *_ in rows}
    truth = "".join(f"{number[c]}\n" for _, (_, c) in sorted(VALIDATION.items()))
    top = "ILSVRC2012_devkit_t12/data/"
    return {f"{top}meta.mat": file.getvalue(), f"{top}ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def ilsvrc_tars(root: Path) -> Path:
    root.mkdir(parents=True)
    inner = {}
    for c in WNIDS:
        path = write_tar(root / f"{c}.tar", {f"{n}.JPEG": data for n, (data, k) in TRAIN.items() if k == c})
        inner[path.name] = path.read_bytes()
        path.unlink()
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    write_tar(root / "ILSVRC2012_img_val.tar", {f"{n}.JPEG": data for n, (data, _) in VALIDATION.items()})
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit(), "w:gz")
    return root


def ilsvrc_folders(root: Path) -> Path:
    files = {f"train/{c}/{n}.JPEG": data for n, (data, c) in TRAIN.items()}
    return write_files(root, files | {f"val/{n}.JPEG": data for n, (data, _) in VALIDATION.items()} | devkit())


def kaggle(root: Path) -> Path:
    top = "ILSVRC/Data/CLS-LOC"
    files = {f"{top}/train/{c}/{n}.JPEG": data for n, (data, c) in TRAIN.items()}
    files |= {f"{top}/val/{n}.JPEG": data for n, (data, _) in VALIDATION.items()}
    files |= {f"{top}/test/ILSVRC2012_test_{i:08d}.JPEG": jpeg(300 + i) for i in range(2)}
    lines = "".join(f"{n},{c} 1 2 3 4 {c} 5 6 7 8 \n" for n, (_, c) in VALIDATION.items())
    files |= {
        "LOC_val_solution.csv": f"ImageId,PredictionString\n{lines}".encode(),
        "ILSVRC/Annotations/CLS-LOC/val/x.xml": b"<x/>",
    }
    return write_files(root, files)


def parquet(root: Path, *, names: tuple[str, ...] | None = WNIDS, more: dict[str, Any] | None = None) -> Path:
    """As `datasets` writes it: names: of the ClassLabel, None = labels are text."""
    import pyarrow
    from pyarrow.parquet import write_table

    for split, images in (("train", TRAIN), ("validation", VALIDATION)):
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        labels = [c if names is None else names.index(c) for _, c in images.values()]
        columns = {"image": pyarrow.array([{"bytes": data, "path": f"{n}.JPEG"} for n, (data, _) in images.items()], kind)}
        columns |= {"label": pyarrow.array(labels)} | {key: pyarrow.array([0] * len(labels)) for key in more or {}}
        features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}} | (
            more or {}
        )
        about = {} if names is None else {"huggingface": json.dumps({"info": {"features": features}})}
        (root / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(columns).replace_schema_metadata(about)
        write_table(table, root / "data" / f"{split}-00000-of-00001.parquet", row_group_size=4)
    return root


def metadata_folder(root: Path, kind: str = "csv") -> Path:
    files = {}
    for split, images in (("train", TRAIN), ("validation", VALIDATION)):
        rows = [{"file_name": f"images/{n}.JPEG", "label": c} for n, (_, c) in images.items()]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        if kind == "csv":
            text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        files |= {f"{split}/images/{n}.JPEG": data for n, (data, _) in images.items()} | {
            f"{split}/metadata.{kind}": text.encode()
        }
    return write_files(root, files)


def webdataset(root: Path, kind: str = "cls") -> Path:
    for split, images in (("train", TRAIN), ("val", VALIDATION)):
        files = {}
        for n, (data, c) in images.items():
            label = c.encode() if kind == "cls" else json.dumps({"wnid": c}).encode()
            files |= {f"{n}.jpg": data, f"{n}.{kind}": label}
        root.mkdir(parents=True, exist_ok=True)
        write_tar(root / f"set-{split}-0000.tar", files)
    return root


def class_tars(root: Path) -> Path:
    root.mkdir(parents=True)
    for c in WNIDS:
        write_tar(root / f"{c}.tar", {f"{n}.JPEG": data for n, (data, k) in TRAIN.items() if k == c})
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "class_folders": image_folder,
    "tiny_imagenet": tiny_imagenet,
    "ilsvrc": ilsvrc_tars,
    "kaggle_ilsvrc": kaggle,
    "hugging_face_parquet": parquet,
    "hugging_face_folder": metadata_folder,
    "webdataset": webdataset,
}


def _text(data: bytes) -> bytes:
    """A string as Python 2 pickled it."""
    return b"T" + struct.pack("<i", len(data)) + data


def _list(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def _pickled(items: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(_text(key) + value for key, value in items.items()) + b"u."


def pixels_as_python_2(pixels: np.ndarray) -> bytes:
    """(rows, columns) uint8 as the opcodes of CIFAR's own files."""
    shape = b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape) + b"\x86"
    kind = (
        b"cnumpy\ndtype\n"
        + _text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + _text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    begin = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R"
    return begin + b"(K\x01" + shape + kind + b"\x89" + _text(pixels.tobytes()) + b"tb"


def cifar(root: Path, archive: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """CIFAR-10's python version with two images per batch; returns {file name row: (3072,) pixels} too."""
    names, rows = [b"airplane", b"automobile", b"bird"], {}
    files = {
        "batches.meta": _pickled({b"num_vis": b"J" + struct.pack("<i", 3072), b"label_names": _list(list(map(_text, names)))})
    }
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(number).integers(0, 256, (2, 3072), dtype=np.uint8)
        labels = [b"K" + bytes([(number + row) % 3]) for row in range(2)]
        items = {b"batch_label": _text(b"x"), b"labels": _list(labels), b"data": pixels_as_python_2(pixels)}
        files[name] = _pickled(items | {b"filenames": _list([_text(b"a.png"), _text(b"b.png")])})
        rows |= {f"{names[(number + row) % 3].decode()}_{name}_{row:05d}": pixels[row] for row in range(2)}
    files = {f"cifar-10-batches-py/{name}": data for name, data in files.items()}
    if not archive:
        return write_files(root, files), rows
    root.mkdir(parents=True)
    return write_tar(root / "cifar-10-python.tar.gz", files, "w:gz"), rows
