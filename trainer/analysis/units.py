"""Durations as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """0:07, 12:40, 3:05:00, 2d 03:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
