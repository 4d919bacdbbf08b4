"""Where MLflow is: the address that may be written down and shown, and the one that is opened.

A file or a command line can't hold a credential (see `trainer.config.credentials`). MLFLOW_TRACKING_URI can: it is cut off here, before
anything is written, and goes to the variables that MLflow reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from trainer.config.credentials import SECRET, without_credentials
from trainer.journal.file import JournalError

CREDENTIALS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "DATABRICKS_TOKEN")


class Address(NamedTuple):
    """uri: may be written and shown. opened: what the client opens. hidden: parts of it that no message may hold."""

    uri: str
    opened: str
    hidden: tuple[str, ...] = ()

    def redacted(self, text: str) -> str:
        """A message of a library without what is hidden."""
        for part in self.hidden:
            text = text.replace(part, "***")
        return without_credentials(text)


def address_of(uri: str) -> Address:
    """The address without its credential. User and password of a server move to MLFLOW_TRACKING_USERNAME and _PASSWORD of this process,
    unless they are set."""
    uri = uri.rstrip("/")
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    user, at, host = address.rpartition("@")
    name, _, password = ("" if rest.startswith("/") else user).partition(":")
    if scheme not in ("http", "https"):
        shown = f"{scheme}://{host}" if at and not rest.startswith("/") else uri.partition("?")[0]
        if not SECRET.search(query):
            return Address(f"{shown}?{query}" if query else shown, uri, _known([password, unquote(password)]))
        return Address(shown, uri, _known([password, unquote(password), query]))
    opened = uri
    if password:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(name))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(password))
        opened = f"{scheme}://{host}" + (f"?{query}" if query else "")
    return Address(f"{scheme}://{host or address}".rstrip("/"), opened, _known([password, unquote(password), query, user]))


def from_environment() -> Address | None:
    """MLFLOW_TRACKING_URI; what MLflow and child processes read of it later has no password either where that is possible."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return None
    found = address_of(given)
    os.environ["MLFLOW_TRACKING_URI"] = found.opened
    return found


def credential() -> str:
    """The variable of the environment that has a credential for MLflow; "" without one."""
    inside = "MLFLOW_TRACKING_URI" if "@" in _authority(os.environ.get("MLFLOW_TRACKING_URI", "")) else ""
    return next((name for name in CREDENTIALS if os.environ.get(name)), inside)


def refuse_unnamed(address: Address, run: Path, given: str) -> None:
    """Credentials of the environment go to a server that the environment names. Raises JournalError for one that only files of the run
    name: they may be another person's. given: `credential()`, before anything of the run was read."""
    named = _authority(os.environ.get("MLFLOW_TRACKING_URI", "")).rpartition("@")[2]
    if given and address.uri.startswith(("http", "databricks")) and _authority(address.uri) != named:
        raise JournalError(
            f"{run}: its files name the server {address.uri}, and {given} is set, which MLflow would send there; if it may have it, "
            f"MLFLOW_TRACKING_URI={address.uri} trilevel sync {run}, else unset {given}"
        )


def _authority(uri: str) -> str:
    return uri.partition("://")[2].partition("/")[0]


def _known(parts: list[str]) -> tuple[str, ...]:
    """The longest first, so that no rest of one is left."""
    return tuple(sorted({part for part in parts if len(part) > 2}, key=len, reverse=True))
