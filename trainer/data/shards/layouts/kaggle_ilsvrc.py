"""ImageNet-1k as Kaggle's ILSVRC archive unpacks: Data/CLS-LOC/train/WNID, Data/CLS-LOC/val without folders, LOC_val_solution.csv."""

from __future__ import annotations

from trainer.data.errors import DataError
from trainer.data.shards.label_file import labels_in
from trainer.data.shards.layouts.layout import Contents, Layout, Options, without_labels
from trainer.data.shards.source_files import SourceFiles
from trainer.data.shards.source_image import Labelled, with_keys

_TOP, _LABELS = "CLS-LOC/", "LOC_val_solution.csv"


def _recognise(files: SourceFiles) -> str | None:
    if not any(_TOP in one.name for one in files.images):
        return None
    labels = files.ending(_LABELS)
    return f"images in Data/{_TOP}" + (f" and {labels[0].name}" if labels else f", without {_LABELS}")


def _read(files: SourceFiles, options: Options) -> Contents:
    below: dict[str, list[Labelled]] = {"train": [], "val": [], "test": []}
    for one in files.images:
        split, _, name = one.name.partition(_TOP)[2].partition("/")
        if split in below:
            below[split].append(Labelled(one, name, name.partition("/")[0]))
    flat = [one for one in below["val"] if "/" not in one.name]
    if flat:
        labels = files.ending(_LABELS)
        if not labels:
            raise DataError(
                f"pack {files.src}: {len(flat)} images in Data/{_TOP}val without class folders, and no {_LABELS}; put that file "
                "of Kaggle's archive beside ILSVRC/"
            )
        table = labels_in(labels[0].read(), labels[0].path, [one.name.rpartition(".")[0] for one in flat])
        below["val"] = [Labelled(found, name, table[name.rpartition(".")[0]]) for found, name, _ in flat]
    splits = {"train": with_keys(files.src, below["train"]), "validation": with_keys(files.src, below["val"])}
    notes = [without_labels("test", len(below["test"]), "test/")] if below["test"] else []
    return Contents({split: images for split, images in splits.items() if images}, notes)


LAYOUT = Layout("kaggle_ilsvrc", "ILSVRC/Data/CLS-LOC/{train,val,test} and LOC_val_solution.csv", _recognise, _read)
