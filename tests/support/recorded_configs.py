"""Configurations as runs recorded them before each method had its own settings."""

from __future__ import annotations

from typing import Any

# What `Config.resolved()` wrote for these sections before each method had its own settings, at the defaults of then.
RECORDED: dict[str, dict[str, Any]] = {
    "examples": {
        "method": "all", "removed": 0.0, "swap": 0.05, "window": "30ep", "updates": 5, "rule": "clear", "restore": "random",
        "ties": "spread", "balanced": False, "anneal": 0.0,
    },
    "tokens": {"method": "all", "keep": 1.0, "blocks": [3, 6, 9], "position": "attention", "fuse": False, "merged": 0},
    "connections": {"method": "all", "keep": 1.0},
    "plan": {"method": "constant", "warmup": "10ep", "length": "100ep", "plateaus": 8, "stairs": []},
}  # fmt: skip


def recorded(plain: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration as such a run recorded it: `plain`, and these sections with `changes`."""
    return plain | {name: section | changes.get(name, {}) for name, section in RECORDED.items()}
