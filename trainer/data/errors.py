"""Errors of data: wrong input, storage that is unavailable, a file that does not exist."""

from __future__ import annotations

from trainer.config.errors import TrilevelError


class DataError(TrilevelError, ValueError):
    """Unusable data; the message names the shard (and key), the fault and the remedy."""


class StorageUnavailable(DataError):
    """Storage is unreachable or the cache's disk fails. Ends the run; a single unreadable shard is only counted as broken images."""


class WorkerDied(DataError):
    """A worker process of a loader ended in mid-run."""

    exit_code = 1  # as any crash: a launcher may start the run again


class NotFound(DataError):
    """The server answered 404 or 410: the file does not exist."""


class Forbidden(DataError):
    """The server answered 401 or 403: the file may not be read; S3 without the right to list answers so for a missing one too."""


class Changed(DataError):
    """The file was replaced on its server while it was read."""
