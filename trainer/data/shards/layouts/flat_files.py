"""Images without class folders: the class is in the file name (`cat_0001.jpg`), or in a file of labels (--labels FILE)."""

from __future__ import annotations

from pathlib import Path

from trainer.data.errors import DataError
from trainer.data.shards.label_file import NoLabels, label_table
from trainer.data.shards.layouts.layout import Contents, Layout, Options, by_split, without_labels
from trainer.data.shards.source_files import SourceFiles
from trainer.data.shards.source_image import Labelled, with_keys

_ANY = Options()


def _recognise(files: SourceFiles) -> str | None:
    if not files.images or any(len(p.parts) > 1 for parts in by_split(files, _ANY).values() for p in parts):
        return None
    return f"no class folders; the class is the file name up to the first `_`, e.g. {files.images[0].name!r}"


def _read(files: SourceFiles, options: Options) -> Contents:
    splits = {}
    for split, parts in by_split(files, options).items():
        for p in parts:
            if "_" not in p.parts[-1].rpartition(".")[0]:
                raise DataError(
                    f"pack {files.src}: no class in {p.found.name!r}: neither a class folder nor `class_name`; pass --labels FILE"
                )
        splits[split] = with_keys(files.src, [Labelled(p.found, p.name(), p.parts[-1].partition("_")[0]) for p in parts])
    return Contents(splits)


def read_with_labels(files: SourceFiles, options: Options) -> Contents:
    """Images of any folders; labels come from the file `options.labels`, see `label_table`. A folder test/ beside others may have none, as
    in competitions: it is left out."""
    splits, notes = {}, []
    found = by_split(files, options, keep_last=False)
    for split, parts in found.items():
        try:
            table = label_table(Path(options.labels or ""), [p.name().rpartition(".")[0] for p in parts])
        except NoLabels:
            if split != "test" or len(found) == 1:
                raise
            notes.append(without_labels(split, len(parts), "test/"))
            continue
        splits[split] = with_keys(files.src, [Labelled(p.found, p.name(), table[p.name().rpartition(".")[0]]) for p in parts])
    return Contents(splits, notes)


LAYOUT = Layout("flat_files", "CLASS_name.jpg without folders", _recognise, _read, general=True)
