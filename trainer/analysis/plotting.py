"""The one style of all plots, and the unit of a time axis."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes

# Okabe and Ito's colours: distinguishable for colour-blind readers and in grey
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"


def plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """No frame above and on the right, grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def time_unit(longest: float) -> tuple[float, str]:
    """(seconds of a unit, its name) for an axis of `longest` seconds."""
    return (3600, "hours") if longest > 5400 else (60, "minutes") if longest > 90 else (1, "seconds")
