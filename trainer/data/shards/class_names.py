"""Class names: which texts are valid, and the file classes.txt that lists them, one name per line in label order."""

from __future__ import annotations

import re
import unicodedata

from trainer.data.errors import DataError

LARGEST_FILE = 16 << 20  # bytes of a classes.txt
MOST_CLASSES = 1 << 20  # a larger number is a mistake: every class up to the largest number gets a name
_LONGEST_NAME = 1000  # characters: a longer label is a caption or another file
_REFUSED = {"Cc": "control", "Zl": "line-breaking", "Zp": "line-breaking", "Cs": "undecodable"}


def check_name(name: str, where: str) -> str:
    """The name, if it is valid. Raises DataError: with a control or line-breaking character it would take two lines of
    classes.txt, and shift the numbers of all later classes."""
    if len(name) > _LONGEST_NAME:
        raise DataError(
            f"{where}: label {name[:40]!r}... has {len(name)} characters, must be <= {_LONGEST_NAME}; check data.labels"
        )
    for letter in name:
        if kind := _REFUSED.get(unicodedata.category(letter)):
            raise DataError(f"{where}: class name {name!r:.80} has the {kind} character {letter!r}; rename the class")
    return name


def decoded(data: bytes, where: str) -> str:
    """Text in UTF-8 (a byte order mark is dropped). Raises DataError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def read_classes(data: bytes, where: str) -> list[str]:
    """The lines of a classes.txt. Raises DataError: not UTF-8, a duplicate name, an empty line, a web page instead of names."""
    if len(data) > LARGEST_FILE:
        raise DataError(f"{where}: larger than {LARGEST_FILE >> 20} MiB; it must have one class name per line")
    if "://" in where and re.match(rb"\s*<", data):  # some servers answer every missing file with a page and status 200
        raise DataError(
            f"{where}: the server sent a page {data[:40]!r}, not class names; upload a classes.txt, or let the server answer 404"
        )
    names = [line.removesuffix("\r") for line in decoded(data, where).removesuffix("\n").split("\n")]
    lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{where}: line {number} is empty; it must have one class name per line")
        if check_name(name, f"{where}, line {number}") in lines:
            raise DataError(f"{where}: lines {lines[name]} and {number} are both {name!r}; class names must be unique")
        lines[name] = number
    if len(names) > MOST_CLASSES:
        raise DataError(f"{where}: {len(names)} lines, at most {MOST_CLASSES} classes are supported")
    return names
