"""The error of the engine."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The processes, the devices or the libraries are not as the run needs them."""
