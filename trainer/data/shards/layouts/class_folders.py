"""Class folders, as torchvision's ImageFolder reads them: the first folder below the split is the class, whatever lies deeper.

Where images of one class lie in several inner folders, the inner folder could be the class as well (Places365: a/airfield/1.jpg); then
both layouts here fit and one has to be chosen.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.data.errors import DataError
from trainer.data.shards.layouts.layout import SPLITS, Contents, Layout, Options, Part, by_split, without_labels
from trainer.data.shards.source_files import SourceFiles
from trainer.data.shards.source_image import Labelled, with_keys

NOT_READ = frozenset({"heic", "heif", "avif", "jp2", "j2k", "jxl", "svg", "psd", "tga", "raw", "cr2", "nef", "dng"})
_ANY = Options()


def _outer(part: Part) -> str:
    return part.parts[0]


def _inner(part: Part) -> str:
    return "/".join(part.parts[:-1])


def _folders(files: SourceFiles) -> tuple[list[Part], str]:
    """(images below a class folder, of all splits; where the classes lie, in words)."""
    splits = by_split(files, _ANY) if files.images else {}
    where = f" below {', '.join(splits)}" if len(splits) > 1 else ""
    return [p for parts in splits.values() for p in parts if len(p.parts) > 1], where


def _recognise_outer(files: SourceFiles) -> str | None:
    found, where = _folders(files)
    if not found:
        return None
    names = {_outer(p) for p in found}
    example = max(found, key=lambda p: len(p.parts))
    return f"the first folder{where} is the class: {len(names)} classes, e.g. {_outer(example)!r} of {example.name()!r}"


def _recognise_inner(files: SourceFiles) -> str | None:
    """Only where it would give other classes than the outer folders."""
    found, where = _folders(files)
    inner: dict[str, set[str]] = {}
    for p in found:
        inner.setdefault(_outer(p), set()).add(_inner(p))
    most = max(inner, key=lambda name: (len(inner[name]), name), default=None)
    # one folder name inside every class (`images`) holds the images of the class; the same several inside each outer folder, as in
    # fold1/cat, fold1/dog, fold2/cat, fold2/dog, can be the classes
    names = {p.parts[1].lower() for p in found if len(p.parts) > 2}
    if most is None or len(inner[most]) == 1 or names <= SPLITS.keys():  # the reader refuses splits inside classes
        return None
    leaves = {_inner(p) for p in found}
    return f"the folder that holds the image{where} is the class: {len(leaves)} classes, e.g. {max(inner[most])!r}"


def _refuse_splits_inside(src: str, parts: list[Part]) -> None:
    """CLASS/train/1.jpg and CLASS/test/2.jpg: one split of both would train on the test images."""
    inner = {p.parts[1] for p in parts if len(p.parts) > 2}
    if len(inner) > 1 and all(name.lower() in SPLITS for name in inner):
        raise DataError(
            f"pack {src}: the folders {', '.join(sorted(inner))} lie inside the class folders, e.g. in {parts[0].parts[0]!r}; "
            "put the splits above the classes: train/CLASS/*.jpg"
        )


def _unread(files: SourceFiles, parts: list[Part]) -> list[str]:
    """A note about pictures whose format is not read. Raises DataError where a folder beside the class folders holds nothing else."""
    left = [name for name in files.others if name.rpartition(".")[2].lower() in NOT_READ]
    if not left:
        return []
    beside = {one.found.name.rpartition("/")[0] for one in parts}
    above = {folder.rpartition("/")[0] for folder in beside}
    for name in left:
        folder = name.rpartition("/")[0]
        if folder not in beside and folder.rpartition("/")[0] in above:
            raise DataError(
                f"pack {files.src}: no image of {folder!r} is read: the format of {name!r} is one of {', '.join(sorted(NOT_READ))}; "
                "convert them to JPEG or PNG, or remove the folder"
            )
    endings = ", ".join(f".{ending}" for ending in sorted({name.rpartition(".")[2].lower() for name in left}))
    return [f"{len(left)} files are not read ({endings}), e.g. {min(left)!r}; convert them to JPEG or PNG to use them"]


def _reader(label: Callable[[Part], str]) -> Callable[[SourceFiles, Options], Contents]:
    def read(files: SourceFiles, options: Options) -> Contents:
        splits, notes = {}, []
        for split, parts in by_split(files, options).items():
            _refuse_splits_inside(files.src, parts)
            bare = [p for p in parts if len(p.parts) == 1]
            if bare and split == "test" and len(bare) == len(parts):
                notes.append(without_labels(split, len(bare), "test/"))
                continue
            if bare:
                raise DataError(
                    f"pack {files.src}: no class for {len(bare)} of {len(parts)} images of {split}, e.g. {bare[0].found.name!r}: neither a "
                    "class folder nor `class_name`; move or remove them, or pack this split alone with --labels FILE"
                )
            splits[split] = with_keys(files.src, [Labelled(p.found, p.name(), label(p)) for p in parts])
        notes += _unread(files, [p for parts in by_split(files, options).values() for p in parts])
        return Contents(splits, notes)

    return read


OUTER = Layout(
    "class_folders", "CLASS/*.jpg or CLASS/images/*.jpg, also below train/ and val/", _recognise_outer, _reader(_outer), general=True
)  # fmt: skip
INNER = Layout(
    "inner_folders", "GROUP/CLASS/*.jpg: the folder that holds the images is the class", _recognise_inner, _reader(_inner), general=True
)  # fmt: skip
