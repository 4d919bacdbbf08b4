"""Clients for web servers, S3, Google Cloud Storage and the Hugging Face Hub, one per process, with the environment's credentials.

netrc and proxies as in `requests`; AWS_* (also AWS_ENDPOINT_URL) as in boto3; GOOGLE_APPLICATION_CREDENTIALS and Google's other
defaults as in google-auth (STORAGE_EMULATOR_HOST: another server, unsigned); HF_TOKEN or `hf auth login`, HF_ENDPOINT. Without
credentials, public buckets and data sets are read unsigned. Libraries are imported in the functions that use them: the fetch process
loads few.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from trainer.data.errors import DataError

TIMEOUT = (10.0, 30.0)  # seconds: to connect, until the next byte

_clients: dict[tuple[str, int], Any] = {}  # by kind and process: connections do not survive a fork


def _once(kind: str, make: Callable[[], Any]) -> Any:
    found = _clients.get((kind, os.getpid()))
    if found is None:
        found = _clients[kind, os.getpid()] = make()
    return found


def web() -> Any:
    import requests

    return _once("http", lambda: _pooled(requests.Session()))


def _pooled(session: Any) -> Any:
    """The session with a connection pool large enough for all reading threads."""
    from requests.adapters import HTTPAdapter

    for start in ("http://", "https://"):
        session.mount(start, HTTPAdapter(pool_connections=8, pool_maxsize=64))
    return session


def google() -> Any:
    def make() -> Any:
        import requests

        try:
            import google.auth
            from google.auth.exceptions import DefaultCredentialsError
            from google.auth.transport.requests import AuthorizedSession
        except ImportError:  # public buckets need no credentials
            return _pooled(requests.Session())
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return _pooled(requests.Session())
        try:
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_only"])
        except DefaultCredentialsError:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise
            return _pooled(requests.Session())
        return _pooled(AuthorizedSession(credentials))

    return _once("gs", make)


def s3() -> Any:
    def make() -> Any:
        try:
            from boto3.session import Session
            from botocore import UNSIGNED
            from botocore.config import Config
        except ImportError:
            raise DataError("s3:// needs boto3: pip install 'trilevel[s3]'") from None
        session = Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        settings = Config(
            connect_timeout=TIMEOUT[0], read_timeout=TIMEOUT[1], retries={"total_max_attempts": 1},  # see `retry`
            max_pool_connections=64, **options,
        )  # fmt: skip
        return session.client("s3", config=settings)

    return _once("s3", make)


def google_server() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    return (host if "://" in host else f"http://{host}").rstrip("/")


def hub_server() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # None: the library's default
