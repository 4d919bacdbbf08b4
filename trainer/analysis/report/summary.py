"""The report of a run: a table and a plot, from its journal alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.table import Table

from trainer.analysis.history import History, history, stored_bytes
from trainer.analysis.report.goodput import TimeAccount, time_account
from trainer.analysis.report.savings import savings_of
from trainer.analysis.units import duration
from trainer.journal.reader import read
from trainer.storage.disk import write_text
from trainer.storage.text import markdown_text

KEPT = ("examples", "tokens", "connections")


class ReportRow(NamedTuple):
    what: str
    value: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The table of a run in three formats: `table` for a terminal, `text` for a log, `markdown` for a page."""

    title: str
    rows: list[ReportRow]
    layers: tuple[tuple[str, str, str], ...] = ()  # pruned by level 4: name, kept share, bytes; for the page alone

    @property
    def table(self) -> Table:
        table = Table(title=self.title, title_style="bold", title_justify="left", show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column()
        for row in self.rows:
            table.add_row(*row)
        return table

    @property
    def text(self) -> str:
        wide = [max(len(row[i]) for row in self.rows) for i in range(2)]
        lines = [f"  {row.what:<{wide[0]}}  {row.value:>{wide[1]}}  {row.note}".rstrip() for row in self.rows]
        return "\n".join([self.title, *lines])

    @property
    def markdown(self) -> str:
        cells = [tuple(markdown_text(cell) for cell in row) for row in self.rows]
        lines = [f"| {what} | {f'**{value}**' if value else ''} | {note} |" for what, value, note in cells]
        if self.layers:
            lines += [
                "",
                "| pruned layer | kept | bytes |",
                "|---|---:|---:|",
                *(f"| {' | '.join(layer)} |" for layer in self.layers),
            ]
        return "\n".join([f"**{markdown_text(self.title)}**", "", "| | | |", "|---|---:|---|", *lines, ""])


def summary(run: Path | str | History) -> Summary:
    """The table of a run, also of one that is still running or was killed. Raises JournalError without a journal."""
    run = run if isinstance(run, History) else history(run)
    rows = [*_accuracy(run)]
    last = run.last
    if run.images_per_second:
        steps = [point["images_per_second"] for point in run.of("step") if point.get("images_per_second")]
        note = f"in training; {steps[0]:,.0f} at the start, {steps[-1]:,.0f} at the end" if steps else "in training"
        rows.append(ReportRow("images/s", f"{run.images_per_second:,.0f}", note))
    for kept in KEPT:
        mean = run.mean_share(kept)
        if mean is not None:
            note = f"{_over(kept)}; {100 * run.shares(kept)[-1][1]:.1f} % at the end"
            rows.append(ReportRow(f"kept {kept}", f"{100 * mean:.1f} %", note))
    saved = run.saved
    if saved is not None:
        rows.append(
            ReportRow(
                "multiply-adds", f"{last.multiply_adds:.3g}", f"forward, {100 * saved:.1f} % less than dense on every example"
            )
        )
    rows += _weights(run)
    rows += _probes(run)
    rows += _certified(run)
    worlds = [str(line.get("world", 1)) for line in run.starts] or ["1"]
    processes = ", then ".join(world for at, world in enumerate(worlds) if at == 0 or world != worlds[at - 1])
    processes += " process" if processes == "1" else " processes"
    trained = f"{duration(last.trained)} of it in training steps{' and probes' if run.of('probe') else ''}"
    rows.append(
        ReportRow("time", duration(last.elapsed), f"{trained}; {last.images:,} images; without start-up and lost steps")
    )
    rows += _machine(run)
    rows.append(
        ReportRow(
            "device hours",
            f"{last.device_seconds / 3600:.3g}",
            f"of all attempts; {processes}, {_device(run)}",
        )
    )
    broken = len(run.of("broken"))
    if broken:
        rows.append(ReportRow("broken images", f"{broken:,}", "listed in the journal"))
    if skipped := len(run.of("skipped")):
        rows.append(ReportRow("skipped steps", f"{skipped:,}", "non-finite loss or gradient; listed in the journal"))
    rows += [ReportRow("warning", "", text) for text in run.starts[-1].get("warnings", ())] if run.starts else []
    if run.attempts > 1:
        rows.append(ReportRow("attempts", str(run.attempts), "without steps of killed attempts that were repeated"))
    status = run.status + (f": {run.reason}" if run.reason else "")
    return Summary(f"{run.name}: {status}, {last.step:,} steps, epoch {last.progress:g}", rows, _layers(run))


def write(directory: Path | str) -> Summary:
    """RUN/report.md and RUN/report.png, which go to MLflow with the run when they are there before `Shipper.finish`."""
    run = history(directory)
    found = summary(run)
    write_text(run.directory / "report.md", found.markdown)
    from trainer.analysis.report.picture import picture  # matplotlib: .7 s of the start of every rank

    picture(run)
    return found


def _accuracy(run: History) -> list[ReportRow]:
    rows = []
    for ema, name in ((False, "top-1"), (True, "top-1, EMA")):
        evals = run.evals(ema)
        if evals:
            best = max(evals, key=lambda point: point["top1"])
            count = f"of {evals[-1]['images']:,} images" if evals[-1].get("images") else "of the validation set"
            note = f"{count}; best {100 * best['top1']:.2f} % at epoch {best.progress:g}"
            rows.append(ReportRow(name, f"{100 * evals[-1]['top1']:.2f} %", note))
    return rows


def _machine(run: History) -> list[ReportRow]:
    """MFU, phases, goodput, energy; only those that the journal has."""
    lines = [step.line for step in run.of("step")]
    rows = []
    if (mfu := run.mfu()) is not None:
        rate = run.matrix_tflops
        of = (
            f"of the {rate:.3g} TFLOP/s that a device reached in large matrix products, at the start or the end"
            if rate
            else "of a device"
        )
        rows.append(ReportRow("MFU", f"{100 * mfu:.1f} %", of))
    phases: dict[str, list[float]] = {}
    for line in lines:
        for phase, spread in (line.get("phases") or {}).items():
            phases.setdefault(phase, []).append(spread["median"])
    if phases:
        found = {phase: median(shares) for phase, shares in phases.items()}
        exposed = found.pop("communication", None)  # a part of backward and optimizer
        most = max(found, key=found.__getitem__, default="rest")
        rest = ", ".join(f"{phase.replace('_', ' ')} {100 * share:.0f}" for phase, share in found.items() if phase != most)
        within = "" if exposed is None else f"; exposed communication, within these: {100 * exposed:.0f}"
        rows.append(
            ReportRow(most.replace("_", " "), f"{100 * found.get(most, 0.0):.0f} %", f"of a sampled step; {rest}{within}")
        )
    last = lines[-1] if lines else {}
    account = time_account(read(run.directory))
    share = account.goodput if account.seconds else last.get("goodput")  # journals of earlier versions have the share alone
    if share is not None:
        first = next((line["time_to_first_step"] for line in lines if "time_to_first_step" in line), None)
        time = "time of all attempts and restarts" if account.seconds else "wall time of all attempts"
        note = f"of the {time} was spent on steps whose weights survive"
        rows.append(ReportRow("goodput", f"{100 * share:.1f} %", note + (f"; first step after {first:.0f} s" if first else "")))
    rows += _causes(account)
    if last.get("energy_kwh") is not None:
        rows.append(ReportRow("energy", f"{last['energy_kwh']:.3g} kWh", "of all devices, measured by NVML"))
    return rows


def _causes(account: TimeAccount) -> list[ReportRow]:
    """Where the time of all attempts and restarts went; nothing for journals that did not record it."""
    if not account.seconds:
        return []
    total = max(account.total, 1e-9)
    parts = [
        f"{name.replace('_', ' ')} {100 * value / total:.1f}"
        for name, value in account.seconds.items()
        if value >= 0.0005 * total
    ]
    note = f"of all attempts and restarts, in %: {', '.join(parts)}"
    if account.paused >= 0.5:
        note += f"; not in it: {duration(account.paused)} between attempts after a stop"
    return [ReportRow("time by cause", duration(total), "; ".join([note, *account.notes]))]


def _certified(run: History) -> list[ReportRow]:
    """The certified speedup over the run's dense baseline; nothing before a plateau was timed."""
    found = savings_of(run.directory) if any("measured" in line.line for line in run.of("control")) else None
    return (
        []
        if found is None or found.speedup is None
        else [ReportRow("speedup, certified", f"{found.speedup:.3f}x", found.text())]
    )


def _weights(run: History) -> list[ReportRow]:
    """What level 4 left of the weights; nothing without it."""
    if not run.of("weights"):
        return []
    last = run.of("weights")[-1]
    sizes, layers = last["bytes"], [f"{name} {100 * share:.0f} %" for name, share in last["layers"].items()]
    stored = (
        f"{sizes['block']:,} bytes of {sizes['dense']:,} dense, {sizes['csr']:,} as CSR" if "csr" in sizes else "not pruned yet"
    )
    if not math.isnan(whole := stored_bytes(run)):
        stored += f"; {whole:,.0f} of the whole network"
    shown = f"; {', '.join(layers)}" if len(set(last["layers"].values())) > 1 else f"; {len(layers)} layers"
    note = f"{stored}; {last['multiply_adds']:.3g} multiply-adds per image with every token{shown}"
    return [ReportRow("kept weights", f"{100 * last['kept']:.1f} %", note)]


def _layers(run: History) -> tuple[tuple[str, str, str], ...]:
    """Kept share and bytes of each pruned layer; nothing without level 4, and from journals that lack the bytes."""
    last = run.of("weights")[-1].line if run.of("weights") else {}
    sizes = last.get("layer_bytes", {})
    return tuple((markdown_text(name), f"{100 * last['layers'][name]:.1f} %", f"{size:,}") for name, size in sizes.items())


def _probes(run: History) -> list[ReportRow]:
    """What `examples.rule: probe` cost; nothing under other rules."""
    probes = run.of("probe")
    if not probes:
        return []
    seconds, count = sum(point["seconds"] for point in probes), sum(point["probed"] for point in probes)
    work = sum(point["probed"] * point["multiply_adds"] for point in probes)
    note = (
        f"of the training time, {duration(seconds)}: {count:,} clean images after {len(probes)} epochs, "
        f"{100 * work / run.last.multiply_adds:.1f} % of the forward multiply-adds"
    )
    return [ReportRow("probe", f"{100 * seconds / max(run.last.trained, 1e-9):.1f} %", note)]


def _over(kept: str) -> str:
    return {"examples": "mean over epochs", "tokens": "of all blocks, mean over images"}.get(kept, "mean over images")


def _device(run: History) -> str:
    device = run.start.get("device") or "unknown device"
    hosts = run.start.get("hosts") or ([run.start["host"]] if run.start.get("host") else [])
    return f"{device}, {len(hosts)} hosts" if len(hosts) > 1 else str(device)
