"""A comparison to look at: a table (terminal, CSV, Markdown) and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import csv
import html
import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from trainer.compare import COSTS, Comparison, Group, Spread, final, score, seed
from trainer.console import duration
from trainer.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, draw_throughput

COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY, "#56B4E9", "#8C6D00")
TITLES = {
    "time": "time at work",
    "device hours": "device hours",
    "multiply-adds": "multiply-adds (forward)",
    "images": "images seen",
}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{padding:.35rem .5rem;border-bottom:1px solid #e2e2e2;text-align:right}
th:first-child,td:first-child{text-align:left;font-weight:600}th{border-bottom:2px solid #888;vertical-align:bottom}
figure{margin:0}svg{width:100%;height:auto}.note{color:#555;font-size:.9rem}.scroll{overflow-x:auto}
.wrong{background:#fff4e5;border-left:4px solid #E69F00;padding:.5rem 1rem}
"""


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row per group, columns by name; the same in all forms of the table."""
    found = []
    for group in comparison.groups:
        last, against = group.runs[0].last, group.against
        row = {
            "run": group.name + " (base)" * (against is None),
            "seeds": ", ".join(str(seed(run)) for run in group.runs),
            "top-1 %": _plus_minus(group.spread(final), 100, "{:.2f}"),
            "against base": "" if against is None else _interval(against.top1, 100, "{:+.2f}"),
            "images/s": _plus_minus(group.spread(lambda run: run.images_per_second), 1, "{:,.0f}"),
            "time": duration(group.spread(lambda run: run.last.elapsed).mean),
            "device hours": _plus_minus(group.spread(lambda run: run.last.device_seconds / 3600), 1, "{:.3g}"),
            "multiply-adds": "" if not last.multiply_adds > 0 else f"{last.multiply_adds:.3g}",
        }
        for kept in ("examples", "tokens", "connections"):
            mean = group.runs[0].mean_share(kept)
            row[f"{kept} %"] = "" if mean is None else f"{100 * mean:.0f}"
        for name, cost in (
            ("whole run: time x", "time"),
            ("device hours x", "device hours"),
            ("multiply-adds x", "multiply-adds"),
        ):
            row[name] = "" if against is None else _interval(against.whole[cost], 1, "{:.2f}")
        row["equal top-1: at %"] = "" if against is None else f"{100 * against.at:.2f}"
        for name, cost in (("equal: time x", "time"), ("equal: device hours x", "device hours"), ("equal: images x", "images")):
            row[name] = "" if against is None else _interval(against.equal[cost], 1, "{:.2f}")
        found.append(row)
    return [{name: row[name] for name in row if any(other[name] for other in found)} for row in found]


def table(comparison: Comparison) -> Table:
    """For a terminal: runs are columns, so that it stays narrow."""
    found = rows(comparison)
    shown = Table(title="against " + comparison.base.name, title_justify="left", title_style="bold")
    shown.add_column("", style="dim")
    for row in found:
        shown.add_column(row["run"], justify="right")
    for name in list(found[0])[1:]:
        shown.add_row(name, *(row[name] for row in found))
    return shown


def markdown(comparison: Comparison) -> str:
    found = rows(comparison)
    lines = ["| " + " | ".join(found[0]) + " |", "|---" + "|---:" * (len(found[0]) - 1) + "|"]
    lines += ["| " + " | ".join(value.replace("|", "\\|") for value in row.values()) + " |" for row in found]
    return "\n".join([*lines, "", *(f"- {text}" for text in warnings(comparison)), ""])


def comma_separated(comparison: Comparison) -> str:
    text, found = io.StringIO(), rows(comparison)
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def warnings(comparison: Comparison) -> list[str]:
    """Why runs may not be compared, each once."""
    found = [text for group in comparison.groups if group.against for text in group.against.wrong]
    found += [
        f"{group.name} and {comparison.base.name} share no seed: differences are of all runs with all, without an interval"
        for group in comparison.groups
        if group.against and not group.against.paired
    ]
    return list(dict.fromkeys(found))


def page(comparison: Comparison) -> str:
    """The whole page: tables, pictures as SVG, what stands against comparing. Loads nothing from anywhere."""
    found, base = rows(comparison), html.escape(comparison.base.name)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in found[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in found)
    wrong = "".join(f"<li>{html.escape(text)}</li>" for text in warnings(comparison))
    parts = [
        f"<h1>{len(comparison.groups)} runs against {base}</h1>",
        f'<div class="wrong"><b>Mind when comparing</b><ul>{wrong}</ul></div>' if wrong else "",
        f'<h2>Table</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        '<p class="note">mean &plusmn; standard deviation over seeds; [ ] 95 % interval of the mean, paired by seed. '
        "&times; above 1: the run needs less than the base. Equal top-1 is the highest that both reached.</p>",
        f"<h2>Accuracy against what it cost</h2><figure>{accuracy(comparison)}</figure>",
        f"<h2>Throughput</h2><figure>{throughput(comparison)}</figure>",
    ]
    classes = per_class(comparison)
    if classes:
        parts.append(f"<h2>Classes that differ most from {base}</h2><figure>{classes}</figure>")
    title = f"<title>Runs against {base}</title>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>{"".join(parts)}</html>\n'


def write(comparison: Comparison, out: Path | str) -> list[Path]:
    """compare.html, compare.md and compare.csv in the folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    forms = {"compare.html": page, "compare.md": markdown, "compare.csv": comma_separated}
    for name, form in forms.items():
        (out / name).write_text(form(comparison))
    return [out / name for name in forms]


def accuracy(comparison: Comparison) -> str:
    """Four panels: top-1 against each cost; one colour per group, one line per run."""
    figure = _figure(10, 7)
    panels = figure.subplots(2, 2, sharey=True).flatten()
    for axes, (cost, read) in zip(panels, COSTS.items(), strict=True):
        longest = max(read(run.last) for group in comparison.groups for run in group.runs)
        scale, unit = _time_unit(longest) if cost == "time" else (1.0, "")
        for group, color in zip(comparison.groups, _colors(comparison), strict=True):
            for i, run in enumerate(group.runs):
                x, y = [read(point) / scale for point in score(run)], [100 * point["top1"] for point in score(run)]
                axes.plot(x, y, color=color, linewidth=1.8, alpha=0.85, label=group.name if i == 0 else None)
                axes.plot(x[-1:], y[-1:], "o", color=color, markersize=4)
        axes.set_xlabel(TITLES[cost] + unit)
        axes.set_xlim(left=0)
        if cost in ("multiply-adds", "images"):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _plain(axes)
    for axes in panels[::2]:
        axes.set_ylabel("validation top-1 (%)")
    panels[0].legend(frameon=False, loc="lower right")
    return _svg(figure)


def throughput(comparison: Comparison) -> str:
    figure = _figure(10, 3.4)
    axes = figure.subplots()
    longest = max(run.last.elapsed for group in comparison.groups for run in group.runs)
    scale, unit = _time_unit(longest)
    tops = []
    for group, color in zip(comparison.groups, _colors(comparison), strict=True):
        for i, run in enumerate(group.runs):
            tops.append(draw_throughput(axes, run, scale, color, group.name if i == 0 else None))
    axes.set_ylim(0, 1.15 * max(tops) or 1)
    axes.set_xlim(left=0)
    axes.set_xlabel("time at work" + unit)
    axes.set_ylabel("images/s in training")
    axes.legend(frameon=False, loc="lower right")
    _plain(axes)
    return _svg(figure)


def per_class(comparison: Comparison, most: int = 12) -> str:
    """Bars of the classes whose accuracy moved most, mean over the seeds; empty where the evaluations don't list classes."""
    base, others = _of_classes(comparison.base), [(g, _of_classes(g)) for g in comparison.groups if g.against]
    others = [(group, values) for group, values in others if base and values and len(values) == len(base)]
    if not base or not others:
        return ""
    moved = sorted(range(len(base)), key=lambda c: -max(abs(values[c] - base[c]) for _, values in others))[:most]
    figure = _figure(10, 1 + 0.32 * len(moved))
    axes, high = figure.subplots(), 0.8 / len(others)
    colors = dict(zip((g.name for g in comparison.groups), _colors(comparison), strict=True))
    for i, (group, values) in enumerate(others):
        y = [row + high * (i + 0.5) - 0.4 for row in range(len(moved))]
        axes.barh(y, [100 * (values[c] - base[c]) for c in moved], high * 0.9, color=colors[group.name], label=group.name)
    names = (comparison.base.runs[0].start.get("classes") or []) if len(comparison.base.runs) else []
    axes.set_yticks(range(len(moved)), [str(names[c]) if c < len(names) else f"class {c}" for c in moved])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("accuracy of the class against the base (points)")
    axes.legend(frameon=False)
    _plain(axes, "x")
    return _svg(figure)


def _of_classes(group: Group) -> list[float]:
    lists = [score(run)[-1].get("per_class") for run in group.runs]
    known = [values for values in lists if isinstance(values, list)]
    return [sum(column) / len(known) for column in zip(*known, strict=True)] if known and len(known) == len(lists) else []


def _plus_minus(spread: Spread, factor: float, form: str) -> str:
    if math.isnan(spread.mean):
        return ""
    said = form.format(factor * spread.mean)
    return said if math.isnan(spread.sd) else f"{said} ± {form.format(factor * spread.sd).lstrip('+')}"


def _interval(spread: Spread, factor: float, form: str) -> str:
    if math.isnan(spread.mean):
        return ""
    said = form.format(factor * spread.mean)
    if math.isnan(spread.half):
        return said
    return f"{said} [{form.format(factor * (spread.mean - spread.half))}, {form.format(factor * (spread.mean + spread.half))}]"


def _time_unit(longest: float) -> tuple[float, str]:
    return (3600, " (hours)") if longest > 5400 else (60, " (minutes)") if longest > 90 else (1, " (seconds)")


def _colors(comparison: Comparison) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(comparison.groups))]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
