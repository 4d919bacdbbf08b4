"""Passwords and tokens in addresses: refused in files and on command lines, which others read, and cut out of messages."""

from __future__ import annotations

import re

REMEDY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
DATABASE_REMEDY = "give it by MLFLOW_TRACKING_URI in the environment"
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET = re.compile(r"(?i)(?:password|passwd|pwd|token|secret|key|signature|credential)[^=&]*=")


def without_credentials(text: str) -> str:
    """A text with the `user:password@` of every URL in it left out."""
    return _USERINFO.sub("", text)


def credential_in(uri: str) -> str | None:
    """What is wrong with an address of MLflow that stands where others read it, with the remedy but without the address; None where
    it holds no credential. A user's name alone, for a database, is none."""
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    if scheme in ("http", "https"):
        if "@" in address:
            return f"holds a user name or password, which the journal and MLflow would show; leave it out and {REMEDY}"
        return f"holds a query, which may be a credential; leave it out and {REMEDY}" if query else None
    user, at, _ = address.rpartition("@")
    if (at and ":" in user) or _SECRET.search(query):
        return f"holds a password, which the journal and MLflow would show; leave it out and {DATABASE_REMEDY}"
    return None
