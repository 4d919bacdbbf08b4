"""The base class of all errors that are meant for the user, and the error of a configuration."""

from __future__ import annotations


class TrilevelError(Exception):
    """An error whose text is the whole message: it names the file or key, the value and the remedy. The command line shows it without
    a stack and exits with 2; every other exception is shown with its stack."""


class ConfigError(TrilevelError, ValueError):
    """A configuration that can't be run; the text names the key, the value and the remedy."""
