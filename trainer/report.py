"""What a run came to: a closing table and a picture, from its journal alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from trainer.console import duration
from trainer.history import History, history
from trainer.savings import savings_of

PICTURE = "report.png"
# Okabe and Ito's colours: told apart by colour-blind readers and in grey
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"
KEPT = {"examples": BLUE, "tokens": ORANGE, "connections": GREEN}


class Row(NamedTuple):
    what: str
    value: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The closing table of a run in three forms: `table` for a terminal, `text` for a log, `markdown` for a page."""

    title: str
    rows: list[Row]

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
        cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in self.rows]
        lines = [f"| {what} | **{value}** | {note} |" for what, value, note in cells]
        return "\n".join([f"**{self.title}**", "", "| | | |", "|---|---:|---|", *lines, ""])


def summary(run: Path | str | History) -> Summary:
    """The table of a run, also of one that is still running or was killed. Raises JournalError where there is no journal."""
    run = run if isinstance(run, History) else history(run)
    rows = [*_accuracy(run)]
    last = run.last
    if run.images_per_second:
        steps = [point["images_per_second"] for point in run.of("step") if point.get("images_per_second")]
        note = f"in training; {steps[0]:,.0f} at the start, {steps[-1]:,.0f} at the end" if steps else "in training"
        rows.append(Row("images/s", f"{run.images_per_second:,.0f}", note))
    for kept in KEPT:
        mean = run.mean_share(kept)
        if mean is not None:
            note = f"{_over(kept)}; {100 * run.shares(kept)[-1][1]:.1f} % at the end"
            rows.append(Row(f"kept {kept}", f"{100 * mean:.1f} %", note))
    saved = run.saved
    if saved is not None:
        rows.append(
            Row("multiply-adds", f"{last.multiply_adds:.3g}", f"forward, {100 * saved:.1f} % less than dense on every example")
        )
    rows += _certified(run)
    world = int(run.start.get("world", 1))
    rows.append(
        Row("time", duration(last.elapsed), f"{duration(last.trained)} of it in training steps; {last.images:,} images")
    )
    rows.append(
        Row("device hours", f"{last.device_seconds / 3600:.3g}", f"{world} process{'es' * (world > 1)}, {_device(run)}")
    )
    broken = len(run.of("broken"))
    if broken:
        rows.append(Row("broken images", f"{broken:,}", "named in the journal"))
    if run.attempts > 1:
        rows.append(Row("attempts", str(run.attempts), "what killed attempts did in vain is left out"))
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


def picture(run: Path | str | History, path: Path | str | None = None) -> Path:
    """Accuracy, throughput and kept shares over the time at work, as a PNG (RUN/report.png). Raises as `summary`."""
    run = run if isinstance(run, History) else history(run)
    path = run.directory / PICTURE if path is None else Path(path)
    figure = Figure(figsize=(8.4, 8.0), dpi=130, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    scale, unit = (3600, "hours") if run.last.elapsed > 5400 else (60, "minutes") if run.last.elapsed > 90 else (1, "seconds")
    _draw_accuracy(top, run, scale)
    _draw_throughput(middle, run, scale)
    _draw_kept(bottom, run, scale)
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    bottom.set_xlim(0, max(run.last.elapsed / scale, 1e-3))
    bottom.set_xlabel(f"time at work ({unit})")
    figure.suptitle(_title(run), x=0.02, ha="left", fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)
    return path


def _accuracy(run: History) -> list[Row]:
    rows = []
    for ema, name in ((False, "top-1"), (True, "top-1, EMA")):
        evals = run.evals(ema)
        if evals:
            best = max(evals, key=lambda point: point["top1"])
            count = f"of {evals[-1]['images']:,} images" if evals[-1].get("images") else "of the validation set"
            note = f"{count}; best {100 * best['top1']:.2f} % at epoch {best.progress:g}"
            rows.append(Row(name, f"{100 * evals[-1]['top1']:.2f} %", note))
    return rows


def _certified(run: History) -> list[Row]:
    """What the run measured against its own dense control; nothing before a plateau was timed."""
    found = savings_of(run.directory) if any("measured" in line.line for line in run.of("control")) else None
    return [] if found is None or found.speedup is None else [Row("speedup, certified", f"{found.speedup:.3f}x", found.text())]


def _over(kept: str) -> str:
    return {"examples": "mean over epochs", "tokens": "of all blocks, mean over images"}.get(kept, "mean over images")


def _device(run: History) -> str:
    device = run.start.get("device") or "device not told"
    hosts = run.start.get("hosts") or ([run.start["host"]] if run.start.get("host") else [])
    return f"{device}, {len(hosts)} hosts" if len(hosts) > 1 else str(device)


def _title(run: History) -> str:
    evals = run.evals()
    said = [run.name]
    if evals:
        said.append(f"top-1 {100 * evals[-1]['top1']:.2f} %")
    if run.images_per_second:
        said.append(f"{run.images_per_second:,.0f} images/s")
    said.append(duration(run.last.elapsed))
    return "   ·   ".join(said)


def _draw_accuracy(axes: Axes, run: History, scale: float) -> None:
    raw, ema = run.evals(False), run.evals(True)
    for evals, color, name in ((raw, BLUE, "top-1"), (ema, PURPLE, "top-1, EMA")):
        if evals:
            y = [100 * point["top1"] for point in evals]
            axes.plot([p.elapsed / scale for p in evals], y, color=color, linewidth=2, marker="o", markersize=3, label=name)
    axes.set_ylabel("validation top-1 (%)")
    if not raw and not ema:
        _nothing(axes, "no evaluation yet")
        return
    axes.set_ylim(0, 102)
    last = (raw or ema)[-1]
    where = (last.elapsed / scale, 100 * last["top1"])
    axes.annotate(f"{where[1]:.2f} %", where, (-4, -16), textcoords="offset points", ha="right", color=BLUE, fontweight="bold")
    if raw and ema:
        axes.legend(frameon=False, loc="lower right")


def _draw_throughput(axes: Axes, run: History, scale: float) -> None:
    axes.set_ylabel("images/s in training")
    top = draw_throughput(axes, run, scale, RED)
    if not top:
        _nothing(axes, "no step logged yet")
        return
    axes.set_ylim(0, 1.15 * top)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def draw_throughput(axes: Axes, run: History, scale: float, color: str, label: str | None = None) -> float:
    """Images/s over time, thin as logged and thick as a running median; returns how high the picture must be, 0 without steps."""
    steps = [point for point in run.of("step") if point.get("images_per_second") is not None]
    if not steps:
        return 0.0
    x = np.array([point.elapsed / scale for point in steps])
    y = np.array([float(point["images_per_second"]) for point in steps])
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(x, _running(y, max(1, len(y) // 40), np.median), color=color, linewidth=2, label=label)
    return float(np.percentile(y, 99))


def _draw_kept(axes: Axes, run: History, scale: float) -> None:
    end, drawn = run.last.elapsed / scale, 0
    for kept, color in KEPT.items():
        shares = run.shares(kept)
        if shares:
            x = [0.0, *(point.elapsed / scale for point, _ in shares[1:]), end]
            y = [100 * share for _, share in shares]
            axes.step(x, [*y, y[-1]], where="post", color=color, linewidth=2, linestyle=("-", "--", ":")[drawn], label=kept)
            drawn += 1
    axes.set_ylabel("kept (%)")
    if not drawn:
        _nothing(axes, "nothing is said of what is kept")
        return
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, loc="lower left", ncols=3)


def _running(values: np.ndarray, reach: int, mean: Callable[[Any], Any]) -> np.ndarray:
    """`mean` over up to `reach` neighbours on both sides."""
    return np.array([mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_yticks([])
