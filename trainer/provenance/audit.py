"""`trilevel audit RUN`: recompute the hash chain of a run, compare it with the journal, and count presentations of examples.

The journal's step lines have the head of a hash chain over all global batches so far (`chain`). The audit recomputes the chain
from configuration, index and kept lists alone, over every attempt of the lineage, and compares it at every step line. Each
interval between two lines is checked from the journal's head at its start, so that a difference has a location. No shard is read.
It proves which examples and augmentation keys were used; not the bytes of the images (the index's hashes do) and not the
arithmetic of the step.
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
from trainer.storage.text import listed

LISTED = 20  # differences and broken images that are listed


@dataclass
class Audit:
    """The result of an audit. problems: texts, empty if all agrees with the journal. presentations: {times: examples}."""

    run: str
    steps: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    marks: int = 0
    differing: int = 0
    chain: str = ""  # recomputed head after the last step in the journal
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
        table = Table(title=f"{self.run}: presentations of examples", title_justify="left")
        for column in ("epoch", "steps", "kept", "once", "more often", "left over", "broken", "kept list"):
            table.add_column(column, justify="right")
        for e in self.epochs:
            steps = f"{e['steps']}" if e["whole"] else f"{e['steps']} of {e['of']}"
            more, over = str(e["more"]), str(e["leftover"]) if e["whole"] else ""
            table.add_row(str(e["epoch"]), steps, str(e["kept"]), str(e["once"]), more, over, str(e["broken"]), e["list"])
        return table

    def text(self) -> str:
        worlds = listed(f"{a['first'] + 1}-{a['last']} on {a['world']}" for a in self.attempts)
        times = listed(f"{count} shown {n} times" for n, count in self.presentations.items())
        lines = [
            f"{self.steps} steps (processes: {worlds}); {self.marks} chain heads in the journal, {self.differing} differ",
            f"presentations per example: {times}",
        ]
        if self.broken:
            some = "; ".join(f"{i}: {reason}" for i, reason in list(self.broken.items())[:LISTED])
            lines.append(f"{len(self.broken)} broken image(s), excluded from the loss: {some}")
        lines += [f"DIFFERS: {problem}" for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"... and {len(self.problems) - LISTED} more")
        lines.append(f"hash chain {self.chain}: {'equal to the journal' if self.equal else 'DIFFERENT from the journal'}")
        return "\n".join(lines)


def audit(run: RecordedRun, progress: bool = True) -> Audit:
    """Recompute the chain and count. A missing or changed kept list ends the recomputation there and is reported."""
    found = Audit(str(run.directory), marks=len(run.logged_steps))
    for attempt, config in run.configs():
        for key, (now, then) in differences(run.config, config).items():
            found.problems.append(f"attempt {attempt} started with {key}={then!r}, config.yaml has {now!r}")
    worlds = {line["attempt"]: line["world"] for line in run.lines if line["kind"] == "start"}
    for attempt, (first, last) in run.surviving_steps().items():
        found.attempts.append({"attempt": attempt, "world": worlds[attempt], "first": first, "last": last})
    if not run.segments:
        found.problems.append("no steps in the journal: nothing was trained, or lines are missing")
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
    """Recomputes the chain and compares it with the journal's heads; `head` uses nothing from the journal."""

    def __init__(self, marks: list[LoggedStep]) -> None:
        self.head = ""
        self._marks, self._at, self._images = marks, 0, 0
        self._from, self._local = 0, ""  # of this interval: last step before it, the journal's head there, extended

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
            found.problems.append(f"{where}: hash chain mismatch: journal {mark.chain}, recomputed {self._local}")
            if found.first_difference is None:
                found.first_difference = {
                    "steps": [self._from + 1, step], "epoch": segment.epoch, "batch": batch, "attempt": segment.attempt,
                    "journal": mark.chain, "again": self._local,
                }  # fmt: skip
        elif self._images != mark.images:
            found.problems.append(f"{where}: {mark.images} images in the journal, {self._images} recomputed")
        self._at, self._from, self._images, self._local = self._at + 1, step, 0, mark.chain


class _Epoch:
    """Presentations in one epoch, over all of its attempts."""

    def __init__(self, run: RecordedRun, segment: Segment) -> None:
        self.number, self._run, self._steps, self._broken = segment.epoch, run, 0, 0
        self._counts = np.zeros(len(run.index), dtype=np.int16)
        self._segment: Segment | None = None

    def add(self, segment: Segment, found: Audit) -> None:
        kept = self._run.selection(segment.kept).num_kept
        if kept != segment.line["kept"]:
            found.problems.append(
                f"epoch {self.number}: {segment.line['kept']} kept examples in the journal, {kept} in its kept list"
            )
        if self._segment is not None and self._segment.kept != segment.kept:
            found.problems.append(
                f"epoch {self.number}: attempt {segment.attempt} resumed with list {segment.kept}, not {self._segment.kept}"
            )
        self._segment = segment
        self._steps += segment.last - segment.first

    def show(self, ids: np.ndarray, broken: int) -> None:
        np.add.at(self._counts, ids, 1)
        self._broken += broken

    def close(self, found: Audit) -> None:
        if self._segment is None:
            return
        run, order = self._run, self._run.order(self._segment)
        repeats = run.layout.repeats
        keep = np.unpackbits(run.selection(self._segment.kept).keep, count=len(run.index), bitorder="little").astype(bool)
        whole = self._steps == order.steps
        wrong = np.flatnonzero((self._counts > 0) & ~keep)
        if len(wrong):
            found.problems.append(f"epoch {self.number}: {len(wrong)} removed examples were shown, e.g. {wrong[:5].tolist()}")
        often = np.flatnonzero((self._counts != 0) & (self._counts != repeats))
        if len(often):
            found.problems.append(
                f"epoch {self.number}: {len(often)} examples were not shown {repeats} time(s), e.g. {often[:5].tolist()}"
            )
        missing = keep & (self._counts == 0)
        left = order.leftover()
        expected = len(left) if repeats == 1 else int(missing.sum())  # with repeats an epoch shows a part
        if whole and int(missing.sum()) != expected:
            found.problems.append(
                f"epoch {self.number}: {int(missing.sum())} kept examples were not shown, expected {expected} left over"
            )
        logged = self._segment.line["leftover"]["count"]
        if logged != len(left):
            found.problems.append(f"epoch {self.number}: {logged} left over in the journal, {len(left)} recomputed")
        found.epochs.append({
            "epoch": self.number, "steps": self._steps, "of": order.steps, "whole": whole, "kept": int(keep.sum()),
            "once": int((self._counts == 1).sum()), "more": int((self._counts > 1).sum()), "leftover": len(left),
            "broken": self._broken, "list": self._segment.kept,
        })  # fmt: skip
