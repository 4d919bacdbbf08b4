"""The picture of a study: top-1 of every arm by multiply-adds, by training time where times count, by bytes of weights where arms differ
in them, and the curves of the reference."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.analysis.comparison.groups import evaluations
from trainer.analysis.comparison.plots import COLORS
from trainer.analysis.comparison.statistics import MeanInterval
from trainer.analysis.report.picture import GREY
from trainer.analysis.study.results import Arm, StudyResult
from trainer.storage.text import plot_text

MARKERS = ("o", "s", "^", "D")


def picture(found: StudyResult, path: Path) -> Path:
    """Means over the seeds, bars of one standard deviation; costs relative to the whole run of the reference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.5, 4 + 0.12 * len(found.arms)), dpi=100, layout="constrained", facecolor="white")
    by_size = any(not math.isnan(arm.stored_share) for arm in found.arms)
    costs = ["multiply-adds", *(["training time"] if found.timed else []), *(["bytes of weights"] if by_size else [])]
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    base = next((arm for arm in found.arms if arm.name == found.file.reference), None)
    for axes, name in zip(panels, costs, strict=True):
        if base and name != "bytes of weights":
            for run in base.runs.values():
                cost = found.time(base.name, run) if name == "training time" else lambda point: point.multiply_adds
                whole = cost(evaluations(run)[-1])
                x = [cost(point) / whole for point in evaluations(run)]
                axes.plot(x, [100 * point["top1"] for point in evaluations(run)], color=GREY, alpha=0.35, linewidth=1)
        for i, arm in enumerate(found.arms):
            x = {"training time": arm.time.mean, "bytes of weights": arm.stored_share}.get(name, arm.multiply_adds.mean)
            if math.isnan(x):
                continue
            sd = 0.0 if math.isnan(arm.top1.sd) else 100 * arm.top1.sd
            axes.errorbar(
                x, 100 * arm.top1.mean, sd, fmt=MARKERS[i // len(COLORS) % len(MARKERS)], color=COLORS[i % len(COLORS)],
                markersize=5, capsize=2, label=plot_text(arm.name),
            )  # fmt: skip
        axes.set_xlabel(f"{name} / {'' if name == 'bytes of weights' else 'whole run of '}{plot_text(found.file.reference)}")
        axes.set_xlim(left=0)
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 (%): mean and standard deviation over seeds")
    if base:
        panels[0].plot([], [], color=GREY, alpha=0.35, label=f"runs of {plot_text(base.name)}")
    panels[0].set_ylim(bottom=_lowest(found.arms, base), top=min(100.0, panels[0].get_ylim()[1]))
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize=8)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


def _lowest(arms: list[Arm], base: Arm | None) -> float:
    """Cuts off the begin of the curve, so that differences between arms are visible."""
    means: list[MeanInterval] = [arm.top1 for arm in arms]
    low = min(100 * (one.mean - (0.0 if math.isnan(one.sd) else one.sd)) for one in means)
    high = max(100 * one.mean for one in [*means, *([base.top1] if base else [])])
    return max(0.0, low - max(1.0, 0.2 * (high - low)))
