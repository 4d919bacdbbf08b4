"""Labels of examples, from a member or the key (`label_file`: from a file), and the order of the classes.

Classes are the sorted names (for ImageNet the sorted wnids, as in timm and torchvision), or integers, used unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from trainer.data.errors import DataError
from trainer.data.shards.class_names import MOST_CLASSES, check_name
from trainer.data.shards.samples import Sample
from trainer.data.shards.tar import read
from trainer.storage.text import listed

_LONGEST_MEMBER = {"cls": 1 << 14, "json": 1 << 24}  # bytes: a longer member is not a label
_NUMBER = re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?|[-+]?\d+\.")


def label_of(labels: str) -> Callable[[Path, Sample], str]:
    """The function (shard, sample) -> label text for data.labels; "" if labels come from a file later. Raises DataError."""
    kind, _, field = labels.partition(":")
    if labels == "key":
        return label_in_key
    if kind == "file" and field:
        return lambda path, sample: ""
    if labels != "cls" and not (kind == "json" and field):
        raise DataError(f"data.labels={labels!r}: unknown value; valid values: cls, json:FIELD, key, file:PATH")
    extension = "cls" if labels == "cls" else "json"

    def label(path: Path, sample: Sample) -> str:
        member = sample.others.get(extension)
        if member is None:
            has = listed(f".{e}" for e in sample.others) or "no other member"
            raise DataError(
                f"shard {path}: key {sample.key!r} has no .{extension} (besides the image: {has}); check the shard, or "
                "set data.labels to one of cls, json:FIELD, key, file:PATH"
            )
        where = f"shard {path}: key {sample.key!r}"
        if member.length > _LONGEST_MEMBER[extension]:
            raise DataError(
                f"{where}: its .{extension} has {member.length} bytes, must be <= {_LONGEST_MEMBER[extension]}; "
                "check data.labels"
            )
        text = read(path, member).decode("utf-8", "replace").strip()
        if not field:
            return check_name(text, where)
        try:
            value = json.loads(text)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{where}: its .json has no field {field!r}: {text[:80]}") from None
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise DataError(f"{where}: field {field!r} of its .json is {value!r:.80}; must be a string or an integer")
        return check_name(str(value), where)

    return label


def label_in_key(path: Path, sample: Sample) -> str:
    folder, _, name = sample.key.rpartition("/")
    label, underscore, _ = name.partition("_")
    if not folder and not underscore:
        raise DataError(
            f"shard {path}: key {sample.key!r} contains no class; use keys 'class/name' or 'class_name', or another data.labels"
        )
    return folder.rpartition("/")[2] or label


def class_numbers(texts: set[str], labels: str, classes: list[str] | None, where: str) -> tuple[dict[str, int], list[str]]:
    """({label text: class number}, classes in order). `classes`: the names to use, None = those of the texts.

    Integers are class numbers, except from keys (a folder is a name) and where `classes` lists each of them as a name, as for labels
    that count from 1. Raises DataError naming the label.
    """
    for text in sorted(texts):
        check_name(text, where)
    decimal = {t for t in texts if t.isascii() and t.isdecimal()} if labels != "key" else set()
    for text in sorted(texts - decimal):
        if not text or (labels != "key" and _NUMBER.fullmatch(text)):  # sorted as text, 10.0 would come before 2.0
            raise DataError(
                f"{where}: {f'invalid label {text!r}' if text else 'empty label'}; use a class name or an integer >= 0"
            )
    if decimal and decimal != texts:
        raise DataError(
            f"{where}: both numbers ({min(decimal)!r}) and names ({min(texts - decimal)!r}) as labels; use only one of them"
        )
    if decimal and not texts <= set(classes or ()):
        number = {t: int(t) for t in texts}
        if (most := max(number.values())) >= MOST_CLASSES:
            raise DataError(f"{where}: class number {most} is too large; must be < {MOST_CLASSES}")
        classes = [str(i) for i in range(max(number.values()) + 1)] if classes is None else classes
    else:
        classes = sorted(texts) if classes is None else classes
        number = {t: i for i, t in enumerate(classes)}
    for text in sorted(texts):
        if number.get(text, len(classes)) >= len(classes):
            raise DataError(
                f"{where}: label {text!r} is not among the {len(classes)} classes in classes.txt beside the shards; "
                "correct that file, or remove it to take the classes from the shards"
            )
    return number, classes
