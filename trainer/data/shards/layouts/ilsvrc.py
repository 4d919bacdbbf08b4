"""ImageNet-1k as image-net.org offers it: ILSVRC2012_img_train.tar (a tar of one tar per class) and ILSVRC2012_img_val.tar, or the folders
train/WNID and val made of them, with the labels of the validation images in the devkit.

The devkit numbers the classes 1 to 1000 in an order of its own; meta.mat holds the wnid of each number (as torchvision reads it).
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable

from trainer.data.errors import DataError
from trainer.data.shards.layouts.class_tars import images_of_class_tars
from trainer.data.shards.layouts.layout import Contents, Layout, Options
from trainer.data.shards.source_files import Found, SourceFiles, tar_files
from trainer.data.shards.source_image import Labelled, with_keys

_TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_DEVKIT = re.compile(r"(^|/)ILSVRC2012_devkit_t12\.(tar\.gz|tgz|tar)$")
_VAL_IMAGE = re.compile(r"(?:^|/)val/ILSVRC2012_val_\d{8}\.JPEG$")
_TRAIN_IMAGE = re.compile(r"(?:^|/)train/((n\d{8})/.*)$")
_VAL_FOLDER = re.compile(r"(?:^|/)val/((n\d{8})/.*)$")
_LARGEST = 1 << 26  # bytes of a file of the devkit; the real ones have 0.2 and 1.9 MB
_REMEDY = "download ILSVRC2012_devkit_t12.tar.gz (2.5 MB) from image-net.org into this folder; it has the labels of the validation images"


def _recognise(files: SourceFiles) -> str | None:
    found = [one.name for one in files.ending(_TRAIN, _VAL, _TRUTH)] + [name for name in files.others if _DEVKIT.search(name)]
    if not found and not (_flat_validation(files) and any(_TRAIN_IMAGE.search(image.name) for image in files.images)):
        return None
    return "found " + ", ".join(found or ["class folders named by wnid and ILSVRC2012_val_*.JPEG without folders"])


def _read(files: SourceFiles, options: Options) -> Contents:
    train: list[Labelled] = []
    for one in files.ending(_TRAIN):
        train += images_of_class_tars(one.path, tar_files(one.path, one.offset, one.length))
    validation = [found for one in files.ending(_VAL) for found in tar_files(one.path, one.offset, one.length)]
    validation += _flat_validation(files)
    train += _in_folders(files, _TRAIN_IMAGE)
    in_folders = _in_folders(files, _VAL_FOLDER)
    splits = {"train": with_keys(files.src, train)} if train else {}
    if validation:
        splits["validation"] = with_keys(files.src, _validation(files, validation))
    elif in_folders:  # where a script moved them
        splits["validation"] = with_keys(files.src, in_folders)
    tests = files.ending("ILSVRC2012_img_test.tar", "ILSVRC2012_img_test_v10102019.tar")
    if not splits:
        raise DataError(f"pack {files.src}: neither {_TRAIN} nor {_VAL} nor train/WNID/*.JPEG found; put them into this folder")
    return Contents(splits, [f"{one.name}: no labels; left out" for one in tests])


def _in_folders(files: SourceFiles, form: re.Pattern[str]) -> list[Labelled]:
    matches = ((image, form.search(image.name)) for image in files.images)
    return [Labelled(image, match[1], match[2]) for image, match in matches if match]


def _flat_validation(files: SourceFiles) -> list[Found]:
    """Validation images without class folders; Kaggle's, which have a list of labels, are another layout."""
    return [image for image in files.images if _VAL_IMAGE.search(image.name) and "CLS-LOC/" not in image.name]


def _validation(files: SourceFiles, images: list[Found]) -> Iterable[Labelled]:
    """Line i of the ground truth is the class number of ILSVRC2012_val_{i}.JPEG."""
    truth, meta = _devkit(files)
    wnid, numbers = _wnids(files.src, meta), truth.split()
    for image in images:
        match = re.search(r"ILSVRC2012_val_(\d{8})\.JPEG$", image.name)
        line = int(match[1]) if match else 0
        if not 1 <= line <= len(numbers) or numbers[line - 1] not in wnid:
            raise DataError(f"pack {files.src}: no label for {image.name!r} in {_TRUTH} ({len(numbers)} lines); {_REMEDY}")
        yield Labelled(image, image.name.rpartition("/")[2], wnid[numbers[line - 1]])


def _devkit(files: SourceFiles) -> tuple[str, bytes]:
    """(the ground truth, the bytes of meta.mat) of the devkit, as an archive or unpacked."""
    for name in files.others:
        if _DEVKIT.search(name):
            try:
                with tarfile.open(fileobj=io.BytesIO(files.others[name].read())) as archive:
                    wanted = [m for m in archive if m.isreg() and m.name.endswith((_TRUTH, _META)) and m.size < _LARGEST]
                    read = {m.name: file.read() for m in wanted if (file := archive.extractfile(m))}
                truth = next(data for member, data in read.items() if member.endswith(_TRUTH))
                return truth.decode(), next(data for member, data in read.items() if member.endswith(_META))
            except (tarfile.TarError, OSError, EOFError, StopIteration, UnicodeDecodeError) as error:
                raise DataError(
                    f"pack {files.src}: {name} cannot be read ({error or 'a file is missing in it'}); {_REMEDY}"
                ) from error
    truth, meta = files.ending(_TRUTH), files.ending(_META)
    if not truth or not meta:
        raise DataError(f"pack {files.src}: validation images, but neither the devkit nor {_TRUTH} with {_META}; {_REMEDY}")
    return truth[0].read().decode("utf-8", "replace"), meta[0].read()


def _wnids(src: str, meta: bytes) -> dict[str, str]:
    """{class number of the devkit: wnid}, of the classes without children."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(s["ILSVRC2012_ID"])): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except Exception as error:  # scipy raises arbitrary exceptions on damaged files
        raise DataError(f"pack {src}: {_META} cannot be read ({error}); {_REMEDY}") from error


LAYOUT = Layout(
    "ilsvrc", f"{_TRAIN}, {_VAL} and ILSVRC2012_devkit_t12.tar.gz, or train/WNID and val/ made of them", _recognise, _read
)
