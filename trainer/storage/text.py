"""Texts from data (names of classes and runs, reasons in a journal, answers of servers), made safe to show."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# Control characters (a terminal obeys ESC), halves of surrogate pairs (no encoder takes them; a file name in Latin-1 gives them), and
# marks that turn the direction of writing. Newline and tab stay.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


LISTED = 6  # items that `listed` names


def listed(items: Iterable[object], most: int = LISTED) -> str:
    """The first items with commas between them, and the number of the others: an error is read, not scrolled."""
    texts = [str(item) for item in items]
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """The text with everything that a terminal obeys, or an encoder refuses, as an escape: `\\x1b`, `\\udcff`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown_text(text: str) -> str:
    """Of a line or a table cell in Markdown: no HTML, no new cell, no new line, no link."""
    one_line = " ".join(printable(text).splitlines())
    return html.escape(one_line, quote=False).replace("|", "\\|").replace("](", "]\\(")


def plot_text(text: str) -> str:
    """Of a label in matplotlib, which reads $...$ as a formula and hides labels with a leading underscore."""
    text = printable(text).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text
