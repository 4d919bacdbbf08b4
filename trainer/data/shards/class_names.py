"""Names of classes: which texts may be one, and the file classes.txt that lists them, a name per line in order."""

from __future__ import annotations

import re
import unicodedata

from trainer.data.errors import DataError

LARGEST_FILE = 16 << 20  # bytes of a classes.txt
MOST_CLASSES = 1 << 20  # more is a mistake: every class up to the largest number gets a name
_LONGEST_NAME = 1000  # characters: a longer label is a caption or another file
_REFUSED = {"Cc": "control", "Zl": "line-breaking", "Zp": "line-breaking", "Cs": "undecodable"}


def check_name(name: str, where: str) -> str:
    """The name, where it may be a class's. Raises DataError: with a control or line-breaking character it would be two lines of
    classes.txt, and shift the numbers of all classes behind it."""
    if len(name) > _LONGEST_NAME:
        raise DataError(
            f"{where}: label {name[:40]!r}... has {len(name)} characters, at most {_LONGEST_NAME}; is this the label?"
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
    """The lines of a classes.txt. Raises DataError: not UTF-8, a name twice or none in a line, a web page instead of names."""
    if len(data) > LARGEST_FILE:
        raise DataError(f"{where}: larger than {LARGEST_FILE >> 20} MiB; it must hold a class name per line")
    if "://" in where and re.match(rb"\s*<", data):  # some servers answer every name with a page and status 200
        raise DataError(
            f"{where}: the server sent a page {data[:40]!r}, not class names; put a classes.txt there, or let it answer 404"
        )
    names = [line.removesuffix("\r") for line in decoded(data, where).removesuffix("\n").split("\n")]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{where}: line {number} is empty; it must hold a class name per line")
        if check_name(name, f"{where}, line {number}") in seen:
            raise DataError(f"{where}: lines {seen[name]} and {number} are both {name!r}; every class needs a name of its own")
        seen[name] = number
    if len(names) > MOST_CLASSES:
        raise DataError(f"{where}: {len(names)} lines, at most {MOST_CLASSES} classes")
    return names
