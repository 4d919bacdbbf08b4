"""The error of the engine."""

from __future__ import annotations

from trainer.config.errors import TrilevelError


class EngineError(TrilevelError, RuntimeError):
    """The processes, the devices or the libraries are not as the run needs them."""
