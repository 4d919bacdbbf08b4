"""Layouts of data sets that `trilevel pack` reads. A new one is a file here and a row in LAYOUTS.

In: the files of a source, by name.
Out: which layout it has and why; its images with their labels, by split.
Never: guesses. Where two layouts fit, or none, an error names what was found and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError
from trainer.data.shards.layouts import (
    cifar,
    class_folders,
    class_tars,
    flat_files,
    hugging_face_folder,
    hugging_face_parquet,
    ilsvrc,
    kaggle_ilsvrc,
    tiny_imagenet,
    webdataset_tars,
)
from trainer.data.shards.layouts.flat_files import read_with_labels
from trainer.data.shards.layouts.layout import Contents, Layout, Options
from trainer.data.shards.layouts.unsupported import what_it_is
from trainer.data.shards.source_files import SourceFiles, list_files
from trainer.data.shards.source_image import SourceImage, digits
from trainer.data.shards.tar import IMAGES

LAYOUTS = (
    tiny_imagenet.LAYOUT,
    cifar.LAYOUT,
    ilsvrc.LAYOUT,
    kaggle_ilsvrc.LAYOUT,
    hugging_face_parquet.LAYOUT,
    hugging_face_folder.LAYOUT,
    webdataset_tars.LAYOUT,
    class_tars.LAYOUT,
    class_folders.OUTER,
    class_folders.INNER,
    flat_files.LAYOUT,
)
_WORDS = ("cls", "key")  # --labels that are not a file; json:FIELD and column:NAME too


class Recognised(NamedTuple):
    """The layout of a source, and why."""

    layout: Layout
    reason: str


class Source(NamedTuple):
    """The images of a source by split. found: its layout and the reason, in words; notes: what was left out; numbers: whether whole
    numbers as labels are class numbers."""

    splits: dict[str, list[SourceImage]]
    found: str
    notes: list[str]
    numbers: bool


def recognise(files: SourceFiles, chosen: str | None = None) -> Recognised:
    """The layout of these files; chosen: the user's, by name. Raises DataError: none fits, or several do."""
    if chosen is not None and chosen not in (names := [layout.name for layout in LAYOUTS]):
        raise DataError(f"--layout {chosen}: unknown value; valid values: {', '.join(names)}")
    for general in (False, True):
        tried = [layout for layout in LAYOUTS if (chosen is None and layout.general == general) or layout.name == chosen]
        found = [Recognised(layout, reason) for layout in tried if (reason := layout.recognise(files))]
        if len(found) == 1:
            return found[0]
        if found:
            listed = "; ".join(f"{one.layout.name} ({one.reason})" for one in found)
            raise DataError(f"pack {files.src}: {len(found)} layouts fit: {listed}; choose one with --layout NAME")
    if chosen is not None:
        form = next(layout.form for layout in LAYOUTS if layout.name == chosen)
        raise DataError(f"pack {files.src}: does not have the layout {chosen} ({form}); leave --layout out")
    raise DataError(f"pack {files.src}: no images found: {what_it_is(files)}. Image files are {', '.join(sorted(IMAGES))}")


def read_source(src: str, labels: str | None, name: str | None, seed: int, scratch: Path, layout: str | None = None) -> Source:
    """The images of a source. name: of the split where folders do not name it, None = train; scratch: a folder for unpacked copies.
    Raises DataError: no images, an unclear layout, names without a class, two images with one key, a split with other classes."""
    if src == "sklearn:digits":
        return Source(digits(seed), "sklearn:digits", [], True)
    files, options = list_files(src, scratch), Options(name, labels, scratch)
    if labels is None or labels in _WORDS or labels.startswith(("json:", "column:")):
        recognised = recognise(files, layout)
        found, numbers = f"{recognised.layout.name}: {recognised.reason}", recognised.layout.numbers
        contents = recognised.layout.read(files, options)
    else:
        if not files.images:
            raise DataError(f"pack {src}: no images found: {what_it_is(files)}. Image files are {', '.join(sorted(IMAGES))}")
        found, numbers, contents = f"label_file: {labels}", True, read_with_labels(files, options)
    _refuse_other_classes(src, contents)
    return Source(contents.splits, found, contents.notes, numbers)


def _refuse_other_classes(src: str, contents: Contents) -> None:
    """Raise DataError where a split has a class without training images."""
    known = {image.label for image in contents.splits.get("train", [])}
    for split, images in contents.splits.items():
        strange = [image for image in images if known and image.label not in known]
        if strange:
            names = {image.label for image in strange}
            raise DataError(
                f"pack {src}: class {min(names)!r} of {split} has no training images ({len(names)} such classes, "
                f"{len(strange)} images, e.g. {strange[0].name!r}; train has {len(known)} classes, e.g. {min(known)!r}); if its "
                f"folder is not the class, pack {split} alone with --labels FILE --name {split}; else remove or rename it"
            )
