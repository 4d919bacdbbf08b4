"""The base class of all user errors, and the error of a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrilevelError(Exception):
    """An error of the user's input: the text names the file or key, the value and the remedy. The command line prints it without a
    traceback and exits with `exit_code`; other exceptions get a traceback."""

    exit_code = 2


class ConfigError(TrilevelError, ValueError):
    """An invalid configuration; the text names the key, the value and the remedy."""


def same_name(word: str, keys: Iterable[str]) -> str:
    """`did you mean A.word, B.word?` with the keys whose last part is the word; empty if there is none."""
    found = [key for key in keys if key.rpartition(".")[2] == word]
    return f"did you mean {', '.join(found)}?" if found else ""


def did_you_mean(word: str, known: Iterable[str], number: int = 1, prefix: str = "", cutoff: float = 0.5) -> str:
    """`did you mean PREFIXsimilar?` with up to `number` of the known words; empty if none is similar. cutoff: difflib's."""
    near = difflib.get_close_matches(word, list(known), n=number, cutoff=cutoff)
    return f"did you mean {', '.join(prefix + one for one in near)}?" if near else ""
