"""The output of a comparison: sentences, a table (terminal, CSV, Markdown) and one self-contained HTML page."""

from __future__ import annotations

import csv
import html
import io
import math
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from trainer.analysis.comparison.figures import COST_KEYS, figures
from trainer.analysis.comparison.groups import Comparison, seed
from trainer.analysis.comparison.plots import accuracy, per_class, throughput
from trainer.analysis.comparison.statistics import MeanInterval
from trainer.analysis.comparison.verdict import differing, sentences
from trainer.analysis.units import duration
from trainer.storage.disk import write_text
from trainer.storage.text import markdown_text, printable


class Column(NamedTuple):
    """A column of the table. figure: its name in `figures`; factor: from the unit there; interval: shown in place of the sd."""

    title: str
    figure: str
    factor: float = 1.0
    form: str = "{:.2f}"
    interval: bool = False

    def text(self, numbers: dict[str, MeanInterval]) -> str:
        found = numbers[self.figure]
        mean, sd, low, high = (self.factor * value for value in (found.mean, found.sd, found.low, found.high))
        if math.isnan(mean):
            return ""
        text = duration(mean) if self.form == DURATION else self.form.format(mean)
        if self.interval:
            return text if math.isnan(low) else f"{text} [{self.form.format(low)}, {self.form.format(high)}]"
        return text if math.isnan(sd) or self.form == DURATION else f"{text} ± {self.form.format(sd).lstrip('+')}"


DURATION = "duration"
COLUMNS = (
    Column("top-1 %", "top1", 100),
    Column("against base", "top1_difference", 100, "{:+.2f}", interval=True),
    Column("images/s", "images_per_second", form="{:,.0f}"),
    Column("MFU %", "mfu", 100, "{:.1f}"),
    Column("MFU: of TFLOP/s", "mfu_tflops", form="{:.3g}"),
    Column("peak memory MiB", "memory_peak_mib", form="{:,.0f}"),
    Column("energy kWh", "energy_kwh", form="{:.3g}"),
    Column("time", "seconds", form=DURATION),
    Column("device hours", "device_hours", form="{:.3g}"),
    Column("multiply-adds", "multiply_adds", form="{:.3g}"),
    Column("kept examples %", "kept_examples", 100, "{:.0f}"),
    Column("kept tokens %", "kept_tokens", 100, "{:.0f}"),
    Column("kept connections %", "kept_connections", 100, "{:.0f}"),
    Column("kept weights %", "kept_weights", 100, "{:.0f}"),
    Column("weights MB", "weights_bytes", 1e-6, "{:.4g}"),
    *(Column(f"whole run: {cost} x", f"whole_{key}", interval=True) for key, cost in COST_KEYS.items() if cost != "images"),
    Column("equal top-1: at %", "equal_top1", 100),
    *(Column(f"equal: {cost} x", f"equal_{key}", interval=True) for key, cost in COST_KEYS.items()),
)
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem 1rem;border-bottom:1px solid #e8e8e8;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;color:#444}th{border-bottom:2px solid #888;vertical-align:bottom}
figure{margin:0}svg{width:100%;height:auto}.note{color:#555;font-size:.9rem}.scroll{overflow-x:auto}
.wrong{background:#fff4e5;border-left:4px solid #E69F00;padding:.5rem 1rem}
"""


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row per group, columns by name, the same in all formats; a column without a value in any row is left out."""
    found = []
    for group, numbers in zip(comparison.groups, figures(comparison), strict=True):
        base = " (base)" if group.against is None else ""
        row = {"run": group.name + base, "seeds": ", ".join(str(seed(run)) for run in group.runs)}
        found.append(row | {column.title: column.text(numbers) for column in COLUMNS})
    return [{name: row[name] for name in row if any(other[name] for other in found)} for row in found]


def table(comparison: Comparison) -> Table:
    """For a terminal, with runs as columns to keep it narrow."""
    found = rows(comparison)
    alone = len(comparison.groups) == 1
    shown = Table(title="compared with " * (not alone) + comparison.base.name, title_justify="left", title_style="bold")
    shown.add_column("", style="dim")
    for row in found:
        shown.add_column(row["run"], justify="right")
    for name in list(found[0])[1:]:
        shown.add_row(name, *(row[name] for row in found))
    return shown


def markdown(comparison: Comparison) -> str:
    found = rows(comparison)
    lines = ["| " + " | ".join(found[0]) + " |", "|---" + "|---:" * (len(found[0]) - 1) + "|"]
    lines += ["| " + " | ".join(markdown_text(value) for value in row.values()) + " |" for row in found]
    parts = [*(f"{markdown_text(text)}\n" for text in sentences(comparison)), *lines]
    if differ := differing(comparison):
        names = " | ".join(markdown_text(group.name) for group in comparison.groups)
        parts += ["", f"| setting that differs | {names} |", "|---" * (1 + len(comparison.groups)) + "|"]
        parts += [f"| {key} | {' | '.join(map(markdown_text, values))} |" for key, values in differ]
    return "\n".join([*parts, "", *(f"- {markdown_text(text)}" for text in warnings(comparison)), ""])


def comma_separated(comparison: Comparison) -> str:
    text, found = io.StringIO(), rows(comparison)
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def warnings(comparison: Comparison) -> list[str]:
    """Why runs are not comparable, or only partly."""
    found, base = list(comparison.wrong), comparison.base
    for group in comparison.groups:
        most = max(len(group.runs), len(base.runs))
        if group.against and not group.against.paired:
            found.append(
                f"{group.name} and {base.name} have no seed in common: differences are over all pairs of runs, without intervals"
            )
        elif group.against and group.against.paired < most:
            found.append(
                f"{group.name} and {base.name} have {group.against.paired} of {most} seeds in common: differences are over these alone"
            )
    return found


def page(comparison: Comparison) -> str:
    """The HTML page: warnings, table, plots as SVG. Loads nothing from the network."""
    found, base = rows(comparison), html.escape(comparison.base.name)
    others = [group.name for group in comparison.groups[1:]]
    heading = f"{html.escape(_listed(others))} compared with {base}" if others else base
    first, *rest = found[0]  # runs are columns, so that the page stays narrow
    head = f"<th>{first}</th>" + "".join(f"<th>{html.escape(row[first])}</th>" for row in found)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{html.escape(row[name])}</td>" for row in found) + "</tr>"
        for name in rest
    )
    wrong = "".join(f"<li>{html.escape(text)}</li>" for text in warnings(comparison))
    parts = [
        f"<h1>{heading}</h1>",
        *(f"<p><b>{html.escape(text)}</b></p>" for text in sentences(comparison)),
        f'<div class="wrong"><b>Warnings</b><ul>{wrong}</ul></div>' if wrong else "",
        f'<h2>Table</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        '<p class="note">mean &plusmn; standard deviation over seeds; [ ] 95 % interval of the mean, paired by seed. '
        "Weights MB: of the whole network in float32, of pruned layers what is left, with indices. "
        "x: base / run, above 1 the run needs less. Equal top-1: the highest that both runs of a pair reached.</p>",
        _settings_table(comparison),
        f"<h2>Accuracy by cost</h2><figure>{accuracy(comparison)}</figure>",
        f"<h2>Throughput</h2><figure>{throughput(comparison)}</figure>",
    ]
    classes = per_class(comparison)
    if classes:
        parts.append(f"<h2>Classes that differ most from {base}</h2><figure>{classes}</figure>")
    title = f"<title>{heading}</title>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>{"".join(parts)}</html>\n'


def _settings_table(comparison: Comparison) -> str:
    differ = differing(comparison)
    if not differ:
        return ""
    head = "".join(f"<th>{html.escape(group.name)}</th>" for group in comparison.groups)
    body = "".join(
        f"<tr><td>{html.escape(key)}</td>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"
        for key, values in differ
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Settings that differ</h2><div class="scroll">{table}</div>'


def write(comparison: Comparison, out: Path | str) -> list[Path]:
    """compare.html, compare.md and compare.csv in the folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    forms = {"compare.html": page, "compare.md": markdown, "compare.csv": comma_separated}
    for name, form in forms.items():
        write_text(out / name, printable(form(comparison)))
    return [out / name for name in forms]


def _listed(names: list[str]) -> str:
    """The names of up to three runs, else their number."""
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
