"""A tar, or a folder, of one tar per class: n01440764.tar holds the images of that class. ILSVRC2012_img_train.tar is such a tar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from trainer.data.errors import DataError
from trainer.data.shards.layouts.layout import Contents, Layout, Options
from trainer.data.shards.layouts.webdataset_tars import is_webdataset
from trainer.data.shards.source_files import Found, SourceFiles, tar_files
from trainer.data.shards.source_image import Labelled, with_keys
from trainer.data.shards.tar import IMAGES

_PEEK = 50  # members of the first tar


def images_of_class_tars(src: str, tars: Iterable[Found]) -> Iterator[Labelled]:
    """The images in tars named CLASS.tar."""
    for one in tars:
        if one.name.endswith(".tar"):
            stem = one.name.rpartition("/")[2].removesuffix(".tar")
            for image in tar_files(one.path, one.offset, one.length):
                if image.name.rpartition(".")[2].lower() in IMAGES:
                    name = f"{stem}/{image.name}"
                    yield Labelled(image._replace(name=name), name, stem)


def _recognise(files: SourceFiles) -> str | None:
    tars = files.ending(".tar")
    if files.images or not tars:
        return None
    first = [one.name for one in islice(tar_files(tars[0].path, tars[0].offset, tars[0].length), _PEEK)]
    if is_webdataset(first) or not any(name.rpartition(".")[2].lower() in IMAGES for name in first):
        return None
    if any("/" in name for name in first):
        return None
    return f"each tar is a class: {len(tars)} classes, e.g. {tars[0].name!r}"


def _read(files: SourceFiles, options: Options) -> Contents:
    images = with_keys(files.src, images_of_class_tars(files.src, files.ending(".tar")))
    if not images:
        raise DataError(f"pack {files.src}: no images in its tars")
    return Contents({options.split(): images})


LAYOUT = Layout("class_tars", "CLASS.tar, in a folder or in a tar", _recognise, _read)
