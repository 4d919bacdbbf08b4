"""What a run came to: a closing table and a picture, from its journal alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.table import Table

from trainer.analysis.history import History, history
from trainer.analysis.report_plot import picture
from trainer.analysis.savings import savings_of
from trainer.analysis.units import duration
from trainer.storage.text import markdown_text

KEPT = ("examples", "tokens", "connections")


class ReportRow(NamedTuple):
    what: str
    value: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The closing table of a run in three forms: `table` for a terminal, `text` for a log, `markdown` for a page."""

    title: str
    rows: list[ReportRow]

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
        lines = [f"| {what} | **{value}** | {note} |" for what, value, note in cells]
        return "\n".join([f"**{markdown_text(self.title)}**", "", "| | | |", "|---|---:|---|", *lines, ""])


def summary(run: Path | str | History) -> Summary:
    """The table of a run, also of one that is still running or was killed. Raises JournalError where there is no journal."""
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
    rows += _certified(run)
    world = int(run.start.get("world", 1))
    rows.append(
        ReportRow("time", duration(last.elapsed), f"{duration(last.trained)} of it in training steps; {last.images:,} images")
    )
    rows += _machine(run)
    rows.append(
        ReportRow("device hours", f"{last.device_seconds / 3600:.3g}", f"{world} process{'es' * (world > 1)}, {_device(run)}")
    )
    broken = len(run.of("broken"))
    if broken:
        rows.append(ReportRow("broken images", f"{broken:,}", "named in the journal"))
    if skipped := len(run.of("skipped")):
        rows.append(ReportRow("skipped steps", f"{skipped:,}", "their loss or gradient was not finite; named in the journal"))
    if run.attempts > 1:
        rows.append(ReportRow("attempts", str(run.attempts), "what killed attempts did in vain is left out"))
    status = run.status + (f": {run.reason}" if run.reason else "")
    return Summary(f"{run.name}: {status}, {last.step:,} steps, epoch {last.progress:g}", rows)


def write(directory: Path | str) -> Summary:
    """RUN/report.md and RUN/report.png, which go to MLflow with the run when they are there before `Shipper.finish`."""
    run = history(directory)
    said = summary(run)
    (run.directory / "report.md").write_text(said.markdown)
    picture(run)
    return said


def where_to_look(directory: Path | str) -> str:
    """How to open the run in MLflow's pages, from what the shipper left in RUN/mlflow.json, or how to bring it there."""
    directory = Path(directory)
    try:
        state = json.loads((directory / "mlflow.json").read_text())
        uri, run_id = str(state["uri"]), state["run_id"]
    except (OSError, ValueError, KeyError):
        state, uri, run_id = {}, "", None
    if not run_id:
        return f"not in MLflow yet; bring it there: trilevel sync {directory}"
    page = f"experiments/{state.get('experiment_id')}/runs/{run_id}"
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/{page}"
    return f"mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000/#/{page}"


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
    """Use of the device and of the time; nothing of what the journal doesn't tell."""
    told = [step.line for step in run.of("step")]
    rows = []
    mfu = [line["mfu"] for line in told if line.get("mfu") is not None]
    if mfu:
        rate = run.start.get("matrix_tflops")
        of = f"of {rate:.3g} TFLOP/s that a device reached in products of matrices at the start" if rate else "of a device"
        rows.append(ReportRow("MFU", f"{100 * median(mfu):.1f} %", of))
    phases: dict[str, list[float]] = {}
    for line in told:
        for phase, spread in (line.get("phases") or {}).items():
            phases.setdefault(phase, []).append(spread["median"])
    if phases:
        found = {phase: median(shares) for phase, shares in phases.items()}
        most = max((phase for phase in found if phase != "communication"), key=found.__getitem__)
        rest = ", ".join(f"{_named(phase)} {100 * share:.0f}" for phase, share in found.items() if phase != most)
        rows.append(ReportRow(_named(most), f"{100 * found[most]:.0f} %", f"of a sampled step; {rest}"))
    last = told[-1] if told else {}
    if last.get("goodput") is not None:
        first = next((line["time_to_first_step"] for line in told if "time_to_first_step" in line), None)
        note = "of the wall time of all attempts was steps that count"
        rows.append(
            ReportRow(
                "goodput", f"{100 * last['goodput']:.1f} %", note + (f"; first step after {first:.0f} s" if first else "")
            )
        )
    if last.get("energy_kwh") is not None:
        rows.append(ReportRow("energy", f"{last['energy_kwh']:.3g} kWh", "of the devices, by NVML"))
    return rows


def _named(phase: str) -> str:
    return "communication (exposed)" if phase == "communication" else phase.replace("_", " ")


def _certified(run: History) -> list[ReportRow]:
    """What the run measured against its own dense control; nothing before a plateau was timed."""
    found = savings_of(run.directory) if any("measured" in line.line for line in run.of("control")) else None
    return (
        []
        if found is None or found.speedup is None
        else [ReportRow("speedup, certified", f"{found.speedup:.3f}x", found.text())]
    )


def _over(kept: str) -> str:
    return {"examples": "mean over epochs", "tokens": "of all blocks, mean over images"}.get(kept, "mean over images")


def _device(run: History) -> str:
    device = run.start.get("device") or "device not told"
    hosts = run.start.get("hosts") or ([run.start["host"]] if run.start.get("host") else [])
    return f"{device}, {len(hosts)} hosts" if len(hosts) > 1 else str(device)
