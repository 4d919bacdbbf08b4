"""The output of a comparison: sentences, a table (terminal, CSV, Markdown) and one self-contained HTML page."""

from __future__ import annotations

import csv
import html
import io
import math
from pathlib import Path

from rich.table import Table

from trainer.analysis.compare import Comparison, MeanInterval, final, seed
from trainer.analysis.compare_plots import accuracy, per_class, throughput
from trainer.analysis.compare_verdict import differing, sentences
from trainer.analysis.history import History, left_of_weights
from trainer.analysis.units import duration
from trainer.storage.disk import write_text
from trainer.storage.text import markdown_text, printable

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
    """One row per group, columns by name, the same in all formats."""
    found, rates = [], _rates([run for group in comparison.groups for run in group.runs])
    for group in comparison.groups:
        against = group.against
        row = {
            "run": group.name + " (base)" * (against is None),
            "seeds": ", ".join(str(seed(run)) for run in group.runs),
            "top-1 %": _plus_minus(group.spread(final), 100, "{:.2f}"),
            "against base": "" if against is None else _interval(against.top1, 100, "{:+.2f}"),
            "images/s": _plus_minus(group.spread(lambda run: run.images_per_second), 1, "{:,.0f}"),
            "MFU %": _plus_minus(group.spread(lambda run: _mfu(run, rates)), 100, "{:.1f}"),
            "peak memory MiB": _plus_minus(group.spread(lambda run: _highest(run, "memory_peak_mib")), 1, "{:,.0f}"),
            "energy kWh": _plus_minus(group.spread(lambda run: _highest(run, "energy_kwh")), 1, "{:.3g}"),
            "time": duration(group.spread(lambda run: run.last.elapsed).mean),
            "device hours": _plus_minus(group.spread(lambda run: run.last.device_seconds / 3600), 1, "{:.3g}"),
            "multiply-adds": _plus_minus(group.spread(lambda run: run.last.multiply_adds or math.nan).alone(), 1, "{:.3g}"),
        }
        for kept in ("examples", "tokens", "connections"):
            shares = [share for run in group.runs if (share := run.mean_share(kept)) is not None]
            row[f"kept {kept} %"] = _plus_minus(MeanInterval.of(shares).alone(), 100, "{:.0f}")
        row["kept weights %"] = _plus_minus(group.spread(lambda run: left_of_weights(run, "kept")).alone(), 100, "{:.0f}")
        row["pruned layers MB"] = _plus_minus(
            group.spread(lambda run: left_of_weights(run, "bytes") / 1e6).alone(), 1, "{:.3g}"
        )
        for name, cost in (
            ("whole run: time x", "time"),
            ("whole run: device hours x", "device hours"),
            ("whole run: multiply-adds x", "multiply-adds"),
        ):
            row[name] = "" if against is None else _interval(against.whole[cost], 1, "{:.2f}")
        row["equal top-1: at %"] = "" if against is None else _plus_minus(against.at, 100, "{:.2f}")
        for name, cost in (
            ("equal: time x", "time"),
            ("equal: device hours x", "device hours"),
            ("equal: multiply-adds x", "multiply-adds"),
            ("equal: images x", "images"),
        ):
            row[name] = "" if against is None else _interval(against.equal[cost], 1, "{:.2f}")
        found.append(row)
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


def _rates(runs: list[History]) -> dict[str, float]:
    """{kind of device and precision: the highest rate in matrix products of these runs, TFLOP/s of a device}: one denominator of MFU."""
    found: dict[str, float] = {}
    for run in runs:
        found[_kind(run)] = max(found.get(_kind(run), 0.0), run.matrix_tflops or 0.0)
    return found


def _kind(run: History) -> str:
    return str([run.start.get("device"), (run.config.get("engine") or {}).get("precision"), run.start.get("hosts")])


def _mfu(run: History, rates: dict[str, float]) -> float:
    found = run.mfu(rates[_kind(run)] or None)
    return math.nan if found is None else found


def _highest(run: History, name: str) -> float:
    return max((float(point[name]) for point in run.of("step") if point.get(name) is not None), default=math.nan)


def _plus_minus(spread: MeanInterval, factor: float, form: str) -> str:
    if math.isnan(spread.mean):
        return ""
    text = form.format(factor * spread.mean)
    return text if math.isnan(spread.sd) else f"{text} ± {form.format(factor * spread.sd).lstrip('+')}"


def _interval(spread: MeanInterval, factor: float, form: str) -> str:
    if math.isnan(spread.mean):
        return ""
    text = form.format(factor * spread.mean)
    if math.isnan(spread.low):
        return text
    return f"{text} [{form.format(factor * spread.low)}, {form.format(factor * spread.high)}]"
