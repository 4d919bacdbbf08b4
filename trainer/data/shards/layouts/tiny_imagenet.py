"""Tiny-ImageNet as it is downloaded: train/WNID/images/*.JPEG, val/images with val/val_annotations.txt, test/images without labels."""

from __future__ import annotations

from trainer.data.shards.label_file import labels_in
from trainer.data.shards.layouts.layout import Contents, Layout, Options, without_labels
from trainer.data.shards.source_files import SourceFiles
from trainer.data.shards.source_image import Labelled, with_keys

_LABELS = "val/val_annotations.txt"


def _recognise(files: SourceFiles) -> str | None:
    for one in files.ending(_LABELS):
        inside = one.name.removesuffix("val_annotations.txt") + "images/"
        if any(image.name.startswith(inside) for image in files.images):
            return f"{one.name} labels the images in {inside}"
    return None


def _read(files: SourceFiles, options: Options) -> Contents:
    (labels,) = files.ending(_LABELS)
    top = labels.name.removesuffix(_LABELS)
    below: dict[str, list[Labelled]] = {"train": [], "val": [], "test": []}
    for one in files.images:
        split, _, name = one.name.removeprefix(top).partition("/")
        if split in below:
            below[split].append(Labelled(one, name, name.partition("/")[0]))
    stems = {one.name: one.name.removeprefix("images/").rpartition(".")[0] for one in below["val"]}
    table = labels_in(labels.read(), f"{labels.path}", list(stems.values()))
    validation = [
        Labelled(found, stems[name] + name[name.rindex(".") :], table[stems[name]]) for found, name, _ in below["val"]
    ]
    splits = {"train": with_keys(files.src, below["train"]), "validation": with_keys(files.src, validation)}
    notes = [without_labels("test", len(below["test"]), "test/")] if below["test"] else []
    return Contents({split: images for split, images in splits.items() if images}, notes)


LAYOUT = Layout("tiny_imagenet", "train/WNID/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt", _recognise, _read)
