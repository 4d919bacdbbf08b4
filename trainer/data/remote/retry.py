"""Retry transient errors of a server with backoff; raise the others with a remedy.

Attempts and waits are urllib3's `Retry` (exponential backoff, jitter, Retry-After). Attempts are counted here, not by an
HTTPAdapter or botocore: each attempt is one request with its own deadline (see `deadline`), and a body that ends early counts as an
attempt too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util.retry import Retry

from trainer.data.errors import DataError, Forbidden, NotFound, StorageUnavailable
from trainer.data.remote.url import scheme

_TRIES, _WAIT, _LONGEST_WAIT = 10, 0.15, 30.0  # attempts in a row without progress (70 s in all); seconds between them
_SILENT = 2  # failures in a row that are not printed
_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_NETWORK = frozenset({  # exception classes of transient errors, as library.class
    "builtins.OSError", "http.HTTPException", "urllib3.HTTPError", "httpx.TransportError", "httpx2.TransportError",
    "botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError", "google.TransportError",
})  # fmt: skip
_LIBRARIES = frozenset({"requests", "urllib3", "boto3", "botocore", "google", "httpx", "httpx2", "huggingface_hub"})
_CREDENTIALS = {
    "s3": "check the AWS credentials in the environment and AWS_ENDPOINT_URL",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS (needs pip install 'trilevel[gs]')",
    "hf": "set HF_TOKEN; for a gated data set, accept its conditions on the Hub first",
}

T = TypeVar("T")


class TransientError(Exception):
    """A failure that another attempt may not meet. reply: urllib3's response, for its Retry-After."""

    def __init__(self, text: str, reply: Any = None) -> None:
        super().__init__(text)
        self.reply = reply


class Stalled(TransientError):
    """The server did not respond in time, or too slowly."""


def tries() -> Retry:
    """The retry budget of a request."""
    return Retry(
        total=_TRIES - 1,
        backoff_factor=_WAIT,
        backoff_max=_LONGEST_WAIT,
        backoff_jitter=_WAIT,
        retry_after_max=int(_LONGEST_WAIT),
    )


def with_retries(url: str, ask: Callable[[], T]) -> T:
    """The result of `ask()`, retried with backoff while it fails with transient errors."""
    left = tries()
    while True:
        try:
            return ask()
        except Exception as error:
            left = backoff_or_raise(url, error, left)


def backoff_or_raise(url: str, error: Exception, left: Retry) -> Retry:
    """Wait before the next attempt; returns the remaining budget. Raises DataError for errors that a retry cannot cure."""
    reason = _transient(url, error)
    reply = error.reply if isinstance(error, TransientError) else None
    try:
        left = left.increment("GET", url, response=reply, error=None if reply else error)
    except MaxRetryError:
        text = f"shard {url}: {reason} (after {len(left.history) + 1} attempts); check that the server is up and reachable"
        raise StorageUnavailable(text) from error
    if isinstance(error, Stalled) or len(left.history) > _SILENT:
        text = f"warning: shard {url}: {reason}; starting attempt {len(left.history) + 1} of {_TRIES}"
        print(text, file=sys.stderr, flush=True)
    with suppress(InvalidHeader):  # a Retry-After that is neither a number nor a date
        left.sleep(reply)
        return left
    left.sleep()
    return left


def check_response(url: str, reply: Any) -> None:
    """Raise the error for a web server's status: TransientError, NotFound, Forbidden or DataError."""
    if reply.status_code in _STATUSES:
        raise TransientError(f"HTTP status {reply.status_code} {reply.reason}", reply.raw)
    if reply.status_code not in (200, 206):
        raise refused(url, reply.status_code, reply.reason)


def refused(url: str, status: int, text: str) -> DataError:
    """The error for a status that no further attempt changes."""
    kind = scheme(url)
    if status in (401, 403):
        hint = _CREDENTIALS.get(kind, "give credentials in a netrc file (NETRC=FILE)")
    elif 300 <= status < 400:
        hint = "check AWS_DEFAULT_REGION and AWS_ENDPOINT_URL" if kind == "s3" else "check the URL"
    else:
        hint = "check the name"
    error = {401: Forbidden, 403: Forbidden, 404: NotFound, 410: NotFound}.get(status, DataError)
    return error(f"shard {url}: HTTP status {status} {without_secrets(text)}; {hint}")


def without_secrets(text: str) -> str:
    """A message without the queries of its URLs (a signed URL that a server redirected to) and without user:password@."""
    return re.sub(r"//[^/\s'\"@]*@", "//", re.sub(r"\?[^\s'\"]+", "?...", text))


def _transient(url: str, error: Exception) -> str:
    """The text of a transient error. Raises DataError for other errors of the network, and `error` itself if it is a bug of ours."""
    if isinstance(error, DataError):
        raise error
    if isinstance(error, TransientError):
        return str(error)
    text = without_secrets(f"{type(error).__name__}: {error}")
    response: Any = getattr(error, "response", None)  # botocore's ClientError has a dict, huggingface_hub's an httpx reply
    if isinstance(response, dict):
        status, text = _s3_error(response)
    else:
        status = getattr(response, "status_code", 0)
        text = getattr(response, "reason_phrase", "") or text
    if status in _STATUSES:
        return f"HTTP status {status} {text}"
    if status:
        raise refused(url, status, text) from None
    kinds = type(error).__mro__
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in kinds}
    wrong = isinstance(error, (ValueError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError))
    if names & _NETWORK and not wrong and "requests.TooManyRedirects" not in names:
        return text
    if (wrong and isinstance(error, (OSError, ImportError))) or any(name.partition(".")[0] in _LIBRARIES for name in names):
        raise DataError(f"shard {url}: {text}") from None
    if isinstance(error, RecursionError):  # botocore follows a redirect by a request for the region, which is redirected again
        raise DataError(
            f"shard {url}: the server redirects every request; check AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
        ) from None
    raise error  # a bug, not the network


def _s3_error(response: dict[str, Any]) -> tuple[int, str]:
    """(status, text) of an S3 error."""
    status, about = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), response.get("Error", {})
    return status, without_secrets(str(about.get("Message") or about.get("Code") or ""))
