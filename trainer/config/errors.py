"""The base class of all user errors, and the error of a configuration."""

from __future__ import annotations


class TrilevelError(Exception):
    """An error of the user's input: the text names the file or key, the value and the remedy. The command line prints it without a
    traceback and exits with 2; other exceptions get a traceback."""


class ConfigError(TrilevelError, ValueError):
    """An invalid configuration; the text names the key, the value and the remedy."""
