"""What to do when a server fails: wait and ask again where it may pass, or say at once what is wrong and the way out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from trainer.data.errors import DataError, NotFound, StorageUnavailable

_TRIES, _WAIT, _LONGEST_WAIT = 10, 0.1, 30.0  # attempts in a row that bring nothing (80 s in all); seconds between them
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may be over at the next attempt. wait: seconds the server asks for."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


def with_retries(url: str, ask: Callable[[], T]) -> T:
    """What `ask()` returns, tried again with backoff while the failure may pass."""
    failures = 0
    while True:
        try:
            return ask()
        except Exception as error:
            failures += 1
            backoff_or_raise(url, error, failures)


def backoff_or_raise(url: str, error: Exception, failures: int) -> None:
    """Wait before the next attempt, or raise DataError where another one makes no sense."""
    if isinstance(error, DataError):
        raise error
    reason = f"{type(error).__name__}: {error}" if not isinstance(error, TransientError) else str(error)
    code = getattr(error, "response", None)
    if isinstance(code, dict):  # botocore's ClientError
        status = code.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status not in _TRANSIENT:
            hint = "are AWS credentials and AWS_ENDPOINT_URL right?" if status in (401, 403) else "is the name right?"
            kind = NotFound if status in (401, 403, 404) else DataError
            raise kind(f"shard {url}: the server says {status} {code.get('Error', {}).get('Message', '')}; {hint}") from error
    elif isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)):
        raise DataError(f"shard {url}: {error}") from error
    elif not isinstance(error, (TransientError, OSError)) and type(error).__module__.split(".")[0] not in (
        "botocore",
        "urllib3",
    ):
        raise error  # our mistake, not the network's (requests' errors are OSErrors)
    if failures >= _TRIES:
        raise StorageUnavailable(
            f"shard {url}: {reason} (after {failures} attempts); is the server up and reachable?"
        ) from error
    longest = min(_WAIT * 2 ** (failures - 1), _LONGEST_WAIT)
    asked = error.wait if isinstance(error, TransientError) else 0.0
    time.sleep(min(max(asked, longest * random.uniform(0.5, 1.0)), _LONGEST_WAIT))  # spread: all ranks fail at once


def check_response(url: str, reply: Any) -> None:
    """Raise what a web server's status means: Passing, Absent or DataError."""
    status = reply.status_code
    if status in _TRANSIENT:
        wait = reply.headers.get("Retry-After", "0")
        raise TransientError(f"the server says {status} {reply.reason}", float(wait) if wait.isdecimal() else 0.0)
    if status not in (200, 206):
        hint = "credentials come from a netrc file (NETRC=FILE)" if status in (401, 403) else "is the name right?"
        kind = NotFound if status in (401, 403, 404, 410) else DataError
        raise kind(f"shard {url}: the server says {status} {reply.reason}; {hint}")
