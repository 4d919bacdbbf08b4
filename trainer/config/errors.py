"""The error of a configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that can't be run; the text names the key, the value and the way out."""
