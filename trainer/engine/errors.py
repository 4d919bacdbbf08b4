"""The errors of the engine."""

from __future__ import annotations

from trainer.config.errors import TrilevelError

LATE = 76  # exit code: a rank did not arrive within engine.timeout, or engine.start_timeout


class EngineError(TrilevelError, RuntimeError):
    """Processes, devices or libraries do not meet the needs of the run; the message has the remedy."""


class RankLate(EngineError):
    """The ranks did not find each other in time; a launcher may start them again."""

    exit_code = LATE
