"""Errors of data: wrong input, storage that is unavailable, a file that does not exist."""

from __future__ import annotations

from trainer.config.errors import TrilevelError


class DataError(TrilevelError, ValueError):
    """Data that can't be used; the text names the shard (and key), what is wrong and the way out."""


class StorageUnavailable(DataError):
    """Storage that can't be reached now. No image is to blame: reading ends, where a single lost shard would only be counted."""


class NotFound(DataError):
    """What a server says isn't there, or not for us."""


class Changed(DataError):
    """A file that was replaced on its server while it was read."""
