"""The plot of a run: accuracy, throughput and kept shares over time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.analysis.history import History, history
from trainer.analysis.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, plain, time_unit
from trainer.analysis.units import duration
from trainer.storage.disk import atomic_write
from trainer.storage.text import plot_text

PICTURE = "report.png"
KEPT = ("examples", "tokens", "connections")
COLORS: dict[str, str] = dict(zip((*KEPT, "weights"), (BLUE, ORANGE, GREEN, PURPLE), strict=True))
LINES = ("-", "--", ":", "-.")


def picture(run: Path | str | History, path: Path | str | None = None) -> Path:
    """Accuracy, throughput and kept shares over time (without gaps between attempts), as a PNG (RUN/report.png). Raises as `summary`."""
    run = run if isinstance(run, History) else history(run)
    path = run.directory / PICTURE if path is None else Path(path)
    figure = Figure(figsize=(8.4, 8.0), dpi=130, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    scale, unit = time_unit(run.last.elapsed)
    _draw_accuracy(top, run, scale)
    _draw_throughput(middle, run, scale)
    draw_kept(bottom, run, scale)
    for axes in (top, middle, bottom):
        plain(axes)
    bottom.set_xlim(0, max(run.last.elapsed / scale, 1e-3))
    bottom.set_xlabel(f"time ({unit})")
    figure.suptitle(_title(run), x=0.02, ha="left", fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        canvas.print_png(file)
    return path


def _title(run: History) -> str:
    evals = run.evals()
    parts = [plot_text(run.name)]
    if evals:
        parts.append(f"top-1 {100 * evals[-1]['top1']:.2f} %")
    if run.images_per_second:
        parts.append(f"{run.images_per_second:,.0f} images/s")
    parts.append(duration(run.last.elapsed))
    return "   ·   ".join(parts)


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


def draw_throughput(axes: Axes, run: History, scale: float, color: str, label: str | None = None, line: str = "-") -> float:
    """Images/s over time: thin as logged, thick the running median; returns the 99th percentile for the axis, 0 without steps."""
    steps = [point for point in run.of("step") if point.get("images_per_second") is not None]
    if not steps:
        return 0.0
    x = np.array([point.elapsed / scale for point in steps])
    y = np.array([float(point["images_per_second"]) for point in steps])
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(x, _running(y, max(1, len(y) // 40), np.median), line, color=color, linewidth=2, label=label)
    return float(np.percentile(y, 99))


def draw_kept(axes: Axes, run: History, scale: float) -> None:
    """Kept shares in % over time, of the weights too in runs with level 4; scale: seconds of a unit of the axis."""
    end = run.last.elapsed / scale
    curves = {kept: [(point.elapsed, share) for point, share in run.shares(kept)] for kept in KEPT}
    curves = {kept: [(0.0, found[0][1]), *found[1:]] for kept, found in curves.items() if found}
    if weights := run.of("weights"):
        curves["weights"] = [(0.0, 1.0), *((point.elapsed, point["kept"]) for point in weights)]
    for (kept, found), line in zip(curves.items(), LINES, strict=False):
        x, y = [elapsed / scale for elapsed, _ in found], [100 * share for _, share in found]
        axes.step([*x, end], [*y, y[-1]], where="post", color=COLORS[kept], linewidth=2, linestyle=line, label=kept)
    axes.set_ylabel("kept (%)")
    if not curves:
        _nothing(axes, "no keep ratios logged")
        return
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, loc="lower left", ncols=4)


def _running(values: np.ndarray, reach: int, mean: Callable[[Any], Any]) -> np.ndarray:
    """`mean` over up to `reach` neighbours on both sides."""
    return np.array([mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_yticks([])
