"""The plots of a comparison, as SVG: accuracy by cost, throughput, classes whose accuracy changed most."""

from __future__ import annotations

import io
import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.analysis.comparison.groups import COSTS, Comparison, Group, evaluations
from trainer.analysis.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, plain, time_unit
from trainer.analysis.report.picture import draw_throughput
from trainer.storage.text import plot_text

COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY, "#56B4E9", "#8C6D00")
SECONDS = {"time": 1, "device hours": 3600}  # of the costs that are times
LINES = ("-", "--", ":", "-.")
TITLES = {
    "time": "time (gaps between attempts left out)",
    "device hours": "device time",
    "multiply-adds": "multiply-adds (forward)",
    "images": "images trained on",
}


def accuracy(comparison: Comparison) -> str:
    """Four panels: top-1 against each cost; one colour per group, one line per run."""
    figure = _figure(10, 7)
    panels = figure.subplots(2, 2, sharey=True).flatten()
    for axes, (cost, read) in zip(panels, COSTS.items(), strict=True):
        longest = max(read(run.last) for group in comparison.groups for run in group.runs)
        scale, unit = time_unit(longest * SECONDS[cost]) if cost in SECONDS else (1, "")
        scale /= SECONDS.get(cost, 1)
        for group, (color, line) in zip(comparison.groups, _styles(comparison), strict=True):
            for i, run in enumerate(group.runs):
                x, y = [read(point) / scale for point in evaluations(run)], [100 * point["top1"] for point in evaluations(run)]
                axes.plot(x, y, line, color=color, linewidth=1.8, alpha=0.85, label=plot_text(group.name) if i == 0 else None)
                axes.plot(x[-1:], y[-1:], "o", color=color, markersize=4)
        axes.set_xlabel(f"{TITLES[cost]} ({unit})" if unit else TITLES[cost])
        axes.set_xlim(left=0)
        if cost in ("multiply-adds", "images"):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain(axes)
    for axes in panels[::2]:
        axes.set_ylabel("validation top-1 (%)")
    _legend(figure, panels[0])
    return _svg(figure)


def throughput(comparison: Comparison) -> str:
    figure = _figure(10, 3.4)
    axes = figure.subplots()
    longest = max(run.last.elapsed for group in comparison.groups for run in group.runs)
    scale, unit = time_unit(longest)
    tops = []
    for group, (color, line) in zip(comparison.groups, _styles(comparison), strict=True):
        for i, run in enumerate(group.runs):
            tops.append(draw_throughput(axes, run, scale, color, plot_text(group.name) if i == 0 else None, line))
    axes.set_ylim(0, 1.15 * max(tops) or 1)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{TITLES['time']} ({unit})")
    axes.set_ylabel("images/s in training")
    _legend(figure, axes)
    plain(axes)
    return _svg(figure)


def per_class(comparison: Comparison, most: int = 12) -> str:
    """Bars of the classes whose accuracy changed most, mean over the seeds; empty if the evaluations don't list classes."""
    base, others = _of_classes(comparison.base), [(g, _of_classes(g)) for g in comparison.groups if g.against]
    others = [(group, values) for group, values in others if base and values and len(values) == len(base)]
    if not base or not others:
        return ""
    known = [c for c in range(len(base)) if not any(math.isnan(values[c] - base[c]) for _, values in others)]
    moved = sorted(known, key=lambda c: -max(abs(values[c] - base[c]) for _, values in others))[:most]
    if not moved:
        return ""
    figure = _figure(10, 1 + 0.32 * len(moved))
    axes, high = figure.subplots(), 0.8 / len(others)
    colors = {group.name: color for group, (color, _) in zip(comparison.groups, _styles(comparison), strict=True)}
    for i, (group, values) in enumerate(others):
        y = [row + high * (i + 0.5) - 0.4 for row in range(len(moved))]
        axes.barh(
            y, [100 * (values[c] - base[c]) for c in moved], high * 0.9, color=colors[group.name], label=plot_text(group.name)
        )
    names = (comparison.base.runs[0].start.get("classes") or []) if len(comparison.base.runs) else []
    axes.set_yticks(range(len(moved)), [plot_text(str(names[c])) if c < len(names) else f"class {c}" for c in moved])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("accuracy of the class, difference to the base (percentage points)")
    _legend(figure, axes)
    plain(axes, "x")
    return _svg(figure)


def _of_classes(group: Group) -> list[float]:
    lists = [evaluations(run)[-1].get("per_class") for run in group.runs]
    known = [values for values in lists if isinstance(values, list)]
    return [sum(column) / len(known) for column in zip(*known, strict=True)] if known and len(known) == len(lists) else []


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the panels, so that it covers no line."""
    lines, names = axes.get_legend_handles_labels()
    if names:
        longest = max(map(len, names))
        figure.legend(
            lines, names, frameon=False, loc="outside upper left", ncols=max(1, min(len(names), 120 // (longest + 8)))
        )


def _styles(comparison: Comparison) -> list[tuple[str, str]]:
    """Colour and line style of each group; line styles differ once all colours are used."""
    return [(COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]) for i in range(len(comparison.groups))]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr]  # the last tick of one panel stays off the first of the next
    return figure


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
