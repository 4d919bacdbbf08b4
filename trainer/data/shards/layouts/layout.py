"""What a layout is, and what layouts share: names without common folders, splits by folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError
from trainer.data.shards.source_files import Found, SourceFiles
from trainer.data.shards.source_image import SourceImage

SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip


def split_of(name: str) -> str | None:
    """The split that the first fitting word of a name means: theirs-val -> validation; None without one."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS), None)


class Options(NamedTuple):
    """name: of the split of a source without splits, None = not given; labels: the words behind --labels; scratch: a folder."""

    name: str | None = None
    labels: str | None = None
    scratch: Path = Path()

    def split(self, found: str = "") -> str:
        return self.name or SPLITS.get(found.lower(), "train")


@dataclass
class Contents:
    """The images of each split, and what was left out, in words."""

    splits: dict[str, list[SourceImage]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A form in which data sets are stored.

    form: how its files look. recognise: the reason why a source has this form, None = it has not; reads names and small files only.
    read: its images. general: tried only if no other layout fits. numbers: whether whole numbers as labels are class numbers, not names."""

    name: str
    form: str
    recognise: Callable[[SourceFiles], str | None]
    read: Callable[[SourceFiles, Options], Contents]
    general: bool = False
    numbers: bool = False


class Part(NamedTuple):
    """A file, and the folders and the file name that remain below what all files share (and below the split's folder)."""

    found: Found
    parts: tuple[str, ...]

    def name(self) -> str:
        return "/".join(self.parts)


def below_common_folders(files: SourceFiles, keep_last: bool = True) -> tuple[str, list[Part]]:
    """(the innermost folder that all images share, "" = none; the images below it). keep_last: the folder of bare images stays, unless
    their names look like `class_name`: it holds the name of their class."""
    parts, shared = [tuple(one.name.split("/")) for one in files.images], ""
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        rest = [p[1:] for p in parts]
        if keep_last and all(len(p) == 1 for p in rest) and not all("_" in p[0] for p in rest):
            break
        shared, parts = parts[0][0], rest
    return shared, [Part(found, p) for found, p in zip(files.images, parts, strict=True)]


def by_split(files: SourceFiles, options: Options, keep_last: bool = True) -> dict[str, list[Part]]:
    """{split: its images}: folders named train, val, test ... are splits, or with such a word in each name (train_set, test_set); without
    them all images are one split.

    Raises DataError where other folders or images lie beside train and validation folders."""
    shared, parts = below_common_folders(files, keep_last)
    firsts = {p.parts[0] for p in parts if len(p.parts) > 1}
    named = {name: SPLITS[name.lower()] for name in firsts if name.lower() in SPLITS}
    worded = {name: split for name in firsts if (split := split_of(name))}
    if worded.keys() == firsts and len(set(worded.values())) > 1:
        named = worded
    bare = [p.found.name for p in parts if len(p.parts) == 1]
    others = sorted(firsts - named.keys()) + bare[:1]
    if len(named) < 2 or (others and len(set(named.values())) < 2):
        return {options.split(shared): parts}
    if others:
        raise DataError(
            f"pack {files.src}: {_listed(sorted(named))} are folders of splits, but {others[0]!r} beside them holds images too; move it "
            "elsewhere, or pack the splits one by one: trilevel pack SRC/train DST --name train"
        )
    return {
        split: [Part(p.found, p.parts[1:]) for p in parts if named[p.parts[0]] == split]
        for split in sorted(set(named.values()))
    }


def without_labels(split: str, count: int, where: str) -> str:
    return f"{split}: {count} images in {where} have no labels and are left out"


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
