"""The error of the engine."""

from __future__ import annotations

from trainer.config.errors import TrilevelError


class EngineError(TrilevelError, RuntimeError):
    """Processes, devices or libraries do not meet the needs of the run; the message has the remedy."""
