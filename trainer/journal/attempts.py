"""The attempts of a run in its journal: how long each lasted, on how many processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Attempt(NamedTuple):
    """begin: start of its processes; last: time of its last line, of a killed one too (both in s since 1970). joules: of its devices."""

    begin: float
    last: float
    processes: int
    joules: float = 0.0

    @property
    def device_seconds(self) -> float:
        return max(0.0, self.last - self.begin) * self.processes


def attempts_of(lines: Iterable[dict[str, Any]]) -> dict[int, Attempt]:
    """Every attempt by number, that of one that failed before its start line by its end line. lines: of the whole journal, not of its
    lineage."""
    found: dict[int, Attempt] = {}
    for line in lines:
        number = line.get("attempt", 0)
        if line["kind"] == "start" or (line["kind"] == "end" and number not in found):
            begin = line["time"] - line.get("starting", 0.0)
            found[number] = Attempt(begin, line["time"], int(line.get("world", 1)))
        elif number in found:
            one = found[number]
            found[number] = one._replace(last=max(one.last, line["time"]), joules=line.get("joules", one.joules))
    return found
