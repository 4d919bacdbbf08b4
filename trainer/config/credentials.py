"""Passwords and tokens in URLs: an error in files and on command lines, which other users can read, and removed from messages."""

from __future__ import annotations

import re

REMEDY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
DATABASE_REMEDY = "give it by MLFLOW_TRACKING_URI in the environment"
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"(?<=://)([^?\s'\"]*)\?[^\s'\"]+")
SECRET = re.compile(r"(?i)(?:pass|pwd|token|secret)[^=&]*=")


def without_credentials(text: str) -> str:
    """The text without the `user:password@` of its URLs."""
    return _USERINFO.sub("", text)


def without_queries(text: str) -> str:
    """The text with `?...` for the query of each of its URLs: that of a signed one is a credential."""
    return _QUERY.sub(r"\1?...", without_credentials(text))


def credential_in(uri: str) -> str | None:
    """The fault and remedy (without the URI) of an MLflow URI with a credential, for places that other users can read; None if it
    has none. For a database, a user name alone is not a credential."""
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    if scheme in ("http", "https"):
        if "@" in address:
            return f"contains a user name or password, which the journal and MLflow would show; remove it and {REMEDY}"
        return f"contains a query, which may be a credential; remove it and {REMEDY}" if query else None
    user = "" if rest.startswith("/") else address.rpartition("@")[0]  # sqlite:////home/a@b/mlflow.db has no user
    if ":" in user or SECRET.search(query):
        return f"contains a password, which the journal and MLflow would show; remove it and {DATABASE_REMEDY}"
    return None


def no_credential(uri: str | None) -> str | None:
    """For `tracking.uri`. Raises ValueError, without the value."""
    if uri is not None and (wrong := credential_in(uri)):
        raise ValueError(f"tracking.uri {wrong}")
    return uri
