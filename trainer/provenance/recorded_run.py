"""A recorded run: any of its global batches, from its configuration, the index of its shards, its journal and its kept lists.

Steps count as in the journal: the first batch of a run is step 1. Only the lineage counts: steps of a killed attempt after the
point from which a later one resumed are not part of the run's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsity.types import Selection
from trainer.config.errors import TrilevelError
from trainer.config.load import load_run, parse_recorded
from trainer.config.run_config import Config
from trainer.data.keyed_hash import row_keys
from trainer.data.loader.dataset import opened
from trainer.data.order import EpochOrder, Layout, Rows
from trainer.data.shards.index import Index
from trainer.journal.reader import cuts, read
from trainer.provenance import kept_lists as kept


class RecordedRunError(TrilevelError, ValueError):
    """A batch that can't be rebuilt: a step the run never made, or a journal with missing lines; the message names it."""


class Segment(NamedTuple):
    """Steps first + 1 to last of one attempt, in one epoch under one kept list; batches of the epoch from `batch` on."""

    attempt: int
    epoch: int
    batch: int
    first: int
    last: int
    kept: str
    line: dict[str, Any]  # the journal's `epoch` line


class LoggedStep(NamedTuple):
    """A step line of the journal. broken: {id: reason} of images since the previous step line that could not be decoded."""

    step: int
    attempt: int
    chain: str
    images: int
    broken: dict[int, str]


class RecordedRun:
    """A run, opened for reading. segments, logged_steps: in step order, of the lineage.

    overrides: `key=value`, e.g. data.train=OTHER/FOLDER. Raises ConfigError, DataError, JournalError, or RecordedRunError (shards
    that are not those of the run, or missing lines).
    """

    def __init__(self, run: Path | str, overrides: Sequence[str] = ()) -> None:
        self.directory = Path(run)
        self.config = load_run(run, overrides)
        self.lines = list(read(self.directory))
        self.index = self._index()
        d = self.config.data
        self.layout = Layout(self.index.sizes, self.config.seed, d.batch, d.lanes, d.window, d.homes, d.repeats)
        try:
            self.segments, self.logged_steps = self._find_segments(), self._find_logged_steps()
            # `seen`: the digest's name in journals of earlier versions
            self.skipped = {
                line["step"]: line["digest"] if "digest" in line else line["seen"]
                for line in self.lines
                if line["kind"] == "skipped"
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordedRunError(
                f"{self.directory}/journal.jsonl: a line has no {error}, or another type; bring the journal back from a copy of the run"
            ) from error
        self.selection = lru_cache(maxsize=2)(self._selection)
        self._order = lru_cache(maxsize=2)(self._build_order)

    def _index(self) -> Index:
        index = opened(self.config.data.train, self.config.data, self.config.data.verify)
        recorded = next((_fingerprint(line) for line in self.lines if line["kind"] == "start"), None)
        if recorded is not None and recorded != index.fingerprint:
            raise RecordedRunError(
                f"{self.directory}: trained on shards with fingerprint {recorded}, data.train={self.config.data.train} has "
                f"{index.fingerprint}; set data.train=PATTERN to the shards of the run"
            )
        return index

    def configs(self) -> list[tuple[int, Config]]:
        """(attempt, configuration of its start line)."""
        where = f"{self.directory}/journal.jsonl, start of attempt"
        starts = [line for line in self.lines if line["kind"] == "start"]
        return [(line["attempt"], parse_recorded(line["config"], f"{where} {line['attempt']}")) for line in starts]

    def surviving_steps(self) -> dict[int, tuple[int, int]]:
        """{attempt: (step it resumed from, its last step in the lineage)}, without attempts that have no step in the lineage."""
        resumed = cuts(self.lines)  # without attempts that were killed between their start line and their resume line
        worked: dict[int, int] = {}
        for line in self.lines:
            if line["kind"] == "step":
                worked[line["attempt"]] = max(line["step"], worked.get(line["attempt"], 0))
        found: dict[int, tuple[int, int]] = {}
        cut = float("inf")
        for attempt in sorted({*resumed, *worked}, reverse=True):
            begin = resumed.get(attempt, 0)
            end = int(min(worked.get(attempt, 0), cut))
            if end > begin:
                found[attempt] = (begin, end)
            cut = min(cut, begin)
        return dict(sorted(found.items()))

    def _find_segments(self) -> list[Segment]:
        found: list[Segment] = []
        for attempt, (first, last) in self.surviving_steps().items():
            lines = [
                ln for ln in self.lines if ln["attempt"] == attempt and ln["kind"] == "epoch" and first <= ln["step"] < last
            ]
            ends = [*[line["step"] for line in lines[1:]], last]
            for line, end in zip(lines, ends, strict=True):
                name = line["facts"]["hash"]
                found.append(Segment(attempt, line["epoch"], line["batch"], line["step"], end, name, line))
        at = (0, 0, 0)  # step, epoch, batch that must come next
        for one in found:
            if (one.first, one.epoch, one.batch) != at:
                raise RecordedRunError(
                    f"{self.directory}: lines are missing in the journal: after step {at[0]} it must continue with epoch {at[1]}, batch "
                    f"{at[2]}, its next epoch line has step {one.first}, epoch {one.epoch}, batch {one.batch}"
                )
            behind, batches = one.batch + one.last - one.first, one.line["steps"]
            if behind > batches:
                raise RecordedRunError(
                    f"{self.directory}: an epoch line is missing in the journal: epoch {one.epoch} has {batches} batches, but {behind} "
                    f"steps up to step {one.last}"
                )
            at = (one.last, one.epoch + 1, 0) if behind == batches else (one.last, one.epoch, behind)
        return found

    def _find_logged_steps(self) -> list[LoggedStep]:
        marks, broken = [], {}
        bounds = self.surviving_steps()
        for line in self.lines:
            first, last = bounds.get(line["attempt"], (0, -1))
            if line["kind"] == "broken" and first < line["step"] <= last:
                broken[line["id"]] = line["reason"]
            elif line["kind"] == "step" and first < line["step"] <= last:
                marks.append(LoggedStep(line["step"], line["attempt"], line["chain"], int(line["images"]), broken))
                broken = {}
        return sorted(marks)

    def segment(self, step: int) -> Segment:
        """The segment of a step. Raises RecordedRunError for a step that is not in the journal."""
        for one in self.segments:
            if one.first < step <= one.last:
                return one
        last = self.segments[-1].last if self.segments else 0
        raise RecordedRunError(f"--step {step}: {self.directory} has steps 1 to {last} in its journal")

    def _selection(self, name: str) -> Selection:
        return kept.read(self.directory, name, len(self.index))

    def _build_order(self, epoch: int, name: str) -> EpochOrder:
        return EpochOrder(self.layout, epoch, self.selection(name).keep)

    def order(self, segment: Segment) -> EpochOrder:
        return self._order(segment.epoch, segment.kept)

    def rows(self, segment: Segment, step: int) -> Rows:
        """The whole global batch of a step in a segment."""
        return self.order(segment).rows(segment.batch + step - segment.first - 1)

    def keys(self, segment: Segment, rows: Rows) -> np.ndarray:
        """(b,) int64: the keys of all random choices about each row."""
        return row_keys(self.config.seed, segment.epoch, rows.ids, rows.copies)


def _fingerprint(start: dict[str, Any]) -> str | None:
    """Of the training shards; None where a start line holds none."""
    train = (start.get("data") or {}).get("train")
    return train.get("fingerprint") if isinstance(train, dict) else None
