"""`trilevel audit RUN`: was seen what the journal says was seen, and what was seen how often.

The journal's step lines carry the head of a hash chain over all global batches so far (`seen`). Here the chain is made again
from configuration, index and kept lists alone, over every attempt of the surviving lineage, and held against every line. Each
window between two lines is judged on its own from the head the journal gives at its start, so that a difference has a place.
No shard is read. What it proves: the examples and their augmentation keys; not the bytes behind them (the index does that) and
not the arithmetic of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from trainer.config.run_config import differences
from trainer.data.progress import progress_bar
from trainer.provenance.hash_chain import digest, extend
from trainer.provenance.kept_lists import KeptError
from trainer.provenance.recorded_run import LoggedStep, RecordedRun, Segment

LISTED = 20  # differences and broken images written out; beyond, their number


@dataclass
class Audit:
    """What an audit found. problems: texts, empty where all is as the journal says. presentations: {times: examples}."""

    run: str
    steps: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    marks: int = 0
    differing: int = 0
    chain: str = ""  # head after the last step that the journal tells, made again
    problems: list[str] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    presentations: dict[int, int] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    first_difference: dict[str, Any] | None = None

    @property
    def equal(self) -> bool:
        return not self.problems

    def facts(self) -> dict[str, Any]:
        return {"equal": self.equal, **vars(self)}

    def table(self) -> Table:
        table = Table(title=f"{self.run}: what was seen", title_justify="left")
        for column in ("epoch", "steps", "kept", "once", "more often", "left over", "broken", "kept list"):
            table.add_column(column, justify="right")
        for e in self.epochs:
            steps = f"{e['steps']}" if e["whole"] else f"{e['steps']} of {e['of']}"
            more, over = str(e["more"]), str(e["leftover"]) if e["whole"] else ""
            table.add_row(str(e["epoch"]), steps, str(e["kept"]), str(e["once"]), more, over, str(e["broken"]), e["list"])
        return table

    def text(self) -> str:
        worlds = ", ".join(f"{a['first'] + 1}-{a['last']} on {a['world']}" for a in self.attempts)
        seen = ", ".join(f"{n} times: {count}" for n, count in self.presentations.items())
        lines = [
            f"{self.steps} steps (processes: {worlds}), {self.marks} heads of the chain in the journal, {self.differing} differ",
            f"presentations per example: {seen}",
        ]
        if self.broken:
            some = "; ".join(f"{i}: {reason}" for i, reason in list(self.broken.items())[:LISTED])
            lines.append(f"{len(self.broken)} broken image(s), without weight wherever they came: {some}")
        lines += [f"DIFFERS: {problem}" for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"... and {len(self.problems) - LISTED} more")
        lines.append(f"chain {self.chain}: {'equal' if self.equal else 'NOT what the journal says'}")
        return "\n".join(lines)


def audit(run: RecordedRun, progress: bool = True) -> Audit:
    """Make the chain again and count. A kept list that is missing or was changed ends the recomputation there, and is named."""
    found = Audit(str(run.directory), marks=len(run.logged_steps))
    for attempt, config in run.configs():
        for key, (now, then) in differences(run.config, config).items():
            found.problems.append(f"attempt {attempt} began with {key}={then!r}, config.yaml has {now!r}")
    worlds = {line["attempt"]: line["world"] for line in run.lines if line["kind"] == "start"}
    for attempt, (first, last) in run.surviving_steps().items():
        found.attempts.append({"attempt": attempt, "world": worlds[attempt], "first": first, "last": last})
    if not run.segments:
        found.problems.append("the journal tells of no step: nothing was trained, or its lines are gone")
        return found
    found.steps = run.segments[-1].last
    counts = np.zeros(len(run.index), dtype=np.int64)
    window = _Window(run.logged_steps)
    with progress_bar("audit", found.steps, "steps", progress) as shown:
        epoch = _Epoch(run, run.segments[0])
        for stretch in run.segments:
            if stretch.epoch != epoch.number:
                epoch.close(found)
                epoch = _Epoch(run, stretch)
            try:
                order = run.order(stretch)
            except KeptError as error:
                found.problems.append(f"epoch {stretch.epoch} (steps {stretch.first + 1} to {stretch.last}): {error}")
                break
            epoch.add(stretch, found)
            for step in range(stretch.first + 1, stretch.last + 1):
                batch = stretch.batch + step - stretch.first - 1
                if batch >= order.steps:
                    found.problems.append(f"step {step}: epoch {stretch.epoch} has {order.steps} batches under its kept list")
                    break
                rows = order.rows(batch)
                broken = window.broken()
                weights = np.ones(len(rows.ids)) if not broken else ~np.isin(rows.ids, list(broken)) * 1.0
                list_weight = run.selection(stretch.kept).weight
                if list_weight is not None:
                    weights = weights * list_weight[rows.ids]
                counts[rows.ids[weights > 0]] += 1
                epoch.show(rows.ids, int((weights == 0).sum()))
                value = digest(rows.ids, run.keys(stretch, rows), weights)
                window.add(step, value, int((weights > 0).sum()), stretch, batch, found)
                shown.advance(shown.task_ids[0])
        epoch.close(found)
    found.chain = window.head
    times, examples = np.unique(counts, return_counts=True)
    found.presentations = dict(zip(times.tolist(), examples.tolist(), strict=True))
    found.broken = {number: reason for mark in run.logged_steps for number, reason in mark.broken.items()}
    return found


class _Window:
    """The chain made again, and held against the journal's heads; `head` never takes anything from the journal."""

    def __init__(self, marks: list[LoggedStep]) -> None:
        self.head = ""
        self._marks, self._at, self._images = marks, 0, 0
        self._from, self._local = 0, ""  # of this window: last step before it, the journal's head there carried on
        self._was_equal = True

    def broken(self) -> dict[int, str]:
        return self._marks[self._at].broken if self._at < len(self._marks) else {}

    def add(self, step: int, value: int, images: int, segment: Segment, batch: int, found: Audit) -> None:
        self.head, self._local = extend(self.head, value), extend(self._local, value)
        self._images += images
        if self._at == len(self._marks) or step < self._marks[self._at].step:
            return
        mark = self._marks[self._at]
        where = f"steps {self._from + 1} to {step} (epoch {segment.epoch}, up to batch {batch}, attempt {segment.attempt})"
        if self._local != mark.chain:
            found.differing += 1
            found.problems.append(f"{where}: the journal's chain is {mark.chain}, made again it is {self._local}")
            if found.first_difference is None:
                found.first_difference = {
                    "steps": [self._from + 1, step], "epoch": segment.epoch, "batch": batch, "attempt": segment.attempt,
                    "journal": mark.chain, "again": self._local,
                }  # fmt: skip
        elif self._images != mark.images:
            found.problems.append(f"{where}: the journal counts {mark.images} images, made again there are {self._images}")
        self._at, self._from, self._images, self._local = self._at + 1, step, 0, mark.chain


class _Epoch:
    """Presentations in one epoch, over the attempts that share it."""

    def __init__(self, run: RecordedRun, segment: Segment) -> None:
        self.number, self._past, self._steps, self._broken = segment.epoch, run, 0, 0
        self._counts = np.zeros(len(run.index), dtype=np.int16)
        self._stretch: Segment | None = None

    def add(self, segment: Segment, found: Audit) -> None:
        kept = self._past.selection(segment.kept).num_kept
        if kept != segment.line["kept"]:
            found.problems.append(f"epoch {self.number}: the journal has {segment.line['kept']} kept, its list {kept}")
        if self._stretch is not None and self._stretch.kept != segment.kept:
            found.problems.append(
                f"epoch {self.number}: attempt {segment.attempt} went on with list {segment.kept}, it began with {self._stretch.kept}"
            )
        self._stretch = segment
        self._steps += segment.last - segment.first

    def show(self, ids: np.ndarray, broken: int) -> None:
        np.add.at(self._counts, ids, 1)
        self._broken += broken

    def close(self, found: Audit) -> None:
        if self._stretch is None:
            return
        past, order = self._past, self._past.order(self._stretch)
        repeats = past.layout.repeats
        keep = np.unpackbits(past.selection(self._stretch.kept).keep, count=len(past.index), bitorder="little").astype(bool)
        whole = self._steps == order.steps
        wrong = np.flatnonzero((self._counts > 0) & ~keep)
        if len(wrong):
            found.problems.append(f"epoch {self.number}: {len(wrong)} dropped examples were shown, e.g. {wrong[:5].tolist()}")
        often = np.flatnonzero((self._counts != 0) & (self._counts != repeats))
        if len(often):
            found.problems.append(f"epoch {self.number}: shown another number of times than {repeats}: {often[:5].tolist()}")
        missing = keep & (self._counts == 0)
        left = order.leftover()
        expected = len(left) if repeats == 1 else int(missing.sum())  # with repeats an epoch shows a part
        if whole and int(missing.sum()) != expected:
            found.problems.append(
                f"epoch {self.number}: {int(missing.sum())} kept examples were not shown, {expected} may be left over"
            )
        told = self._stretch.line["leftover"]["count"]
        if told != len(left):
            found.problems.append(f"epoch {self.number}: the journal has {told} left over, made again there are {len(left)}")
        found.epochs.append({
            "epoch": self.number, "steps": self._steps, "of": order.steps, "whole": whole, "kept": int(keep.sum()),
            "once": int((self._counts == 1).sum()), "more": int((self._counts > 1).sum()), "leftover": len(left),
            "broken": self._broken, "list": self._stretch.kept,
        })  # fmt: skip
