"""Configurations as runs recorded them before each method had its own settings: every key of every method, whatever the method.

Such records are in the config.yaml, the checkpoints and the journal of old runs. The keys of other methods had no effect, so they are
dropped when read. A record is recognised by having the keys of several methods in the four sections of `RECORDED`, which no configuration
that is valid today has.
"""

from __future__ import annotations

from typing import Any

from trainer.config.method_section import MethodSection
from trainer.config.run_config import Config

# keys that every record has, whatever its methods
RECORDED = {
    "examples": {"method", "removed", "swap", "window", "updates"},
    "tokens": {"method", "keep", "blocks", "position", "fuse"},
    "connections": {"method", "keep"},
    "plan": {"method", "warmup", "length", "plateaus", "stairs"},
}


def method_sections() -> dict[str, type[MethodSection]]:
    """The sections of the configuration with a key `method`, by name."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, MethodSection)}


def without_foreign(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration as plain values; if it is such a record, without the keys of other methods."""
    sections = method_sections()
    if not all(isinstance(raw.get(name), dict) and keys <= raw[name].keys() for name, keys in RECORDED.items()):
        return raw
    cleaned = dict(raw)
    for name, section in sections.items():
        there = raw.get(name)
        if isinstance(there, dict) and there.get("method") in section.methods():
            kept = [*section.own_keys(), *section.keys_of(there["method"])]
            foreign = set(section.all_keys()) - set(kept)
            cleaned[name] = {key: value for key, value in there.items() if key not in foreign}
    return cleaned
