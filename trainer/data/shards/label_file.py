"""Labels from a text file: which line belongs to which image. Ambiguous lines are errors."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError
from trainer.data.shards.class_names import decoded

_BOXES = re.compile(r"(\S+)(?: -?\d+){4}(?: \1(?: -?\d+){4})*")  # Kaggle's LOC_val_solution.csv: label and box, repeated
_NUMBER = re.compile("[0-9]{1,20}")  # int() fails at 4300 digits; too large a class is refused later


class NoLabels(DataError):
    """No image of a split has a line in the file of labels."""


class _Line(NamedTuple):
    """name, label: None where the line has one column. words: their number in a line separated by blanks, else 0."""

    number: int
    name: str
    label: str | None
    words: int


def label_table(path: Path, keys: list[str]) -> dict[str, str]:
    """{key: label} from a file: lines `name label`, or one label per line for the sorted keys.

    A line with a tab is split at tabs, else one with a comma at commas (with CSV's quotes), else at blanks; with tabs and
    commas, the third and later columns are ignored. A name may have an extension, and more or fewer folders than the key if only
    one image matches. Lines of other images (a heading) are ignored. Raises DataError: no label (for all keys: NoLabels), two different
    labels or an ambiguous name for a key.
    """
    if not path.is_file():
        raise DataError(f"labels {path}: no such file")
    return labels_in(path.read_bytes(), str(path), keys, warn=True)


def labels_in(data: bytes, path: str, keys: list[str], *, warn: bool = False) -> dict[str, str]:
    """`label_table` of the bytes of a file; path: for messages; warn: print that further columns are ignored."""
    lines = _parse(path, decoded(data, f"labels {path}"), warn)
    if lines and all(line.label is None for line in lines):
        return _in_order(path, [line.name for line in lines], keys)
    return _by_name(path, [line for line in lines if line.label is not None], keys)


def _parse(path: str, text: str, warn: bool) -> list[_Line]:
    found, ignored = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        separator = next((s for s in "\t," if s in line), None)
        if not line.strip():
            continue
        if separator is None:
            columns = line.split()
            found.append(_Line(number, columns[0], columns[1] if len(columns) > 1 else None, len(columns)))
            continue
        try:
            columns = next(csv.reader([line.strip()], delimiter=separator)) if '"' in line else line.split(separator)
        except csv.Error as error:
            raise DataError(f"labels {path}, line {number}: {error}") from error
        name, label = columns[0].strip(), columns[1].strip() if len(columns) > 1 else None
        boxes = _BOXES.fullmatch(label or "")
        ignored += len(columns) > 2
        found.append(_Line(number, name, boxes[1] if boxes else label, 0))
    if ignored and warn:
        print(f"labels {path}: columns after the second are ignored (in {ignored} lines)", file=sys.stderr)
    return found


def _in_order(path: str, labels: list[str], keys: list[str]) -> dict[str, str]:
    if len(labels) != len(keys):
        raise DataError(
            f"labels {path}: {len(labels)} labels for {len(keys)} images; give one label per image, or lines `name label`"
        )
    if all(_NUMBER.fullmatch(label) for label in labels) and min(map(int, labels)) == 1:
        raise DataError(
            f"labels {path}: class numbers start at 1 (ILSVRC's own numbering is not the order of sorted wnids); "
            "use a file of wnids, or numbers from 0 in sorted order of the class names"
        )
    return dict(zip(sorted(keys), labels, strict=True))


def _by_name(path: str, lines: list[_Line], keys: list[str]) -> dict[str, str]:
    """Whole names first; then names with more folders than the key, then with fewer."""
    table: dict[str, str] = {}
    every = dict.fromkeys(keys)
    for of_name, of_key in ((_itself, _itself), (_tails, _itself), (_itself, _tails)):
        for stems in (_without_extension, _before_first_dot):
            left = [key for key in every if key not in table]
            if left:
                table |= _matched(path, lines, left, Counter(p for key in every for p in of_key(key)), stems, of_name, of_key)
    unknown = [key for key in every if key not in table]
    if unknown:
        kind = NoLabels if len(unknown) == len(every) else DataError
        raise kind(
            f"labels {path}: no label for {unknown[0]!r} and {len(unknown) - 1} more of {len(keys)} images; add their lines, or pack the "
            "folder of the others alone"
        )
    return table


_Forms = Callable[[str], Iterator[str]]


def _matched(
    path: str, lines: list[_Line], keys: list[str], claims: Counter[str], stems: _Forms, of_name: _Forms, of_key: _Forms
) -> dict[str, str]:
    """{key: label} of the keys that match in one way of comparing. claims: how many keys a name matches."""
    first: dict[str, _Line] = {}
    other: dict[str, _Line] = {}  # a line with another label
    for line in lines:
        for stem in stems(line.name):
            for part in of_name(stem):
                if first.setdefault(part, line).label != line.label:
                    other[part] = line
    table = {}
    for key in keys:
        part = next((part for part in of_key(key) if part in first), None)
        if part is None:
            continue
        line = first[part]
        if part in other:
            raise DataError(
                f"labels {path}: {key!r} has label {line.label!r} in line {line.number} and {other[part].label!r} in line "
                f"{other[part].number}; keep one label per image, and write names with their folders"
            )
        if claims[part] > 1:
            raise DataError(
                f"labels {path}, line {line.number}: {line.name!r} matches {claims[part]} images, among them {key!r}; write names "
                "with their folders"
            )
        if line.words > 2:
            raise DataError(
                f"labels {path}, line {line.number}: {line.words} words for {key!r}; put a tab or a comma between name and label, or "
                "remove the other words"
            )
        table[key] = str(line.label)
    return table


def _itself(name: str) -> Iterator[str]:
    yield name


def _tails(name: str) -> Iterator[str]:
    """ "a/b/c" -> "b/c", "c"."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def _without_extension(name: str) -> Iterator[str]:
    """The name, and the name without its last extension."""
    yield name
    folder, slash, file = name.rpartition("/")
    if "." in file:
        yield folder + slash + file.rpartition(".")[0]


def _before_first_dot(name: str) -> Iterator[str]:
    """As in webdataset's keys."""
    folder, slash, file = name.rpartition("/")
    yield folder + slash + file.partition(".")[0]
