"""Names and reasons from data are shown as they are: never read as rich markup, matplotlib's formulas, HTML or a terminal's commands."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from tests.support.journals import lines, write
from trainer.__main__ import main
from trainer.analysis.report.summary import summary
from trainer.analysis.report.summary import write as write_report
from trainer.cli.output import show_table

EVIL = {
    "closing tag": "key '[/x]' has 0 images",
    "tag": "[red]a[/red]",
    "link": "[link=file:///etc/passwd]x[/link]",
    "emoji": ":smile:",
    "formula": "$\\foo$ $x^$",
    "one dollar": "a$b",
    "escape": "\x1b[2J\x1b]0;t\x07",
    "surrogate": "caf\udce9",
    "html": "<img src=x onerror=alert(1)>|b",
    "underscore": "_hidden",
    "direction": "a\u202eb",
    "newline": "a\nb",
}
PLAIN = {"escape": "\\x1b[2J\\x1b]0;t\\x07", "surrogate": "caf\\udce9", "direction": "a\\u202eb"}


def made(folder: Path, text: str, sparse: bool = True) -> Path:
    """A run whose name, device, classes, commit and reason are `text`."""
    start, *rest, end = lines(sparse=sparse)
    about = {"config": start["config"] | {"name": text}, "device": text, "commit": text, "classes": [text, "b"]}
    for i, line in enumerate(rest):
        if line["kind"] == "eval":
            rest[i] = line | {"per_class": [0.1 * sparse + 0.01 * i, 0.9]}
    return write(folder, [start | about, *rest, end | {"status": "failed", "reason": text}])


@pytest.mark.parametrize("kind", EVIL)
def test_report_and_compare(kind: str, tmp_path: Path, capsys: Any) -> None:
    text = EVIL[kind]
    one, other = made(tmp_path / "one", text), made(tmp_path / "other", f"{text} 2", sparse=False)
    write_report(one)
    assert main(["report", str(one)]) == 0
    report = capsys.readouterr().out
    assert main(["compare", str(one), str(other), "--out", str(tmp_path / "out")]) == 0
    comparison = capsys.readouterr().out
    shown = PLAIN.get(kind, text).split("\n")[0]
    assert shown in report and shown in comparison.replace("\n", " ")
    assert not {"\x1b", "\x07", "\u202e", "\udce9"} & set(report + comparison)
    for page in (one / "report.md", tmp_path / "out" / "compare.md", tmp_path / "out" / "compare.html"):
        content = page.read_text()
        assert "<img" not in content and not {"\x1b", "\u202e"} & set(content)
    if kind == "html":
        row = next(line for line in (one / "report.md").read_text().splitlines() if line.startswith("| device"))
        assert row.replace("\\|", "").count("|") == 4
    svg = (tmp_path / "out" / "compare.html").read_text()
    assert svg.count("<svg") == 3


def test_a_table_takes_no_markup(capsys: Any) -> None:
    table = Table(title="[bold]t[/bold] [/x]")
    table.add_column("[i]c[/i]")
    table.add_row("[/y] :smile: \x1b[31m")
    show_table(table)
    report = capsys.readouterr().out
    assert "[bold]t[/bold] [/x]" in report and "[i]c[/i]" in report and "[/y] :smile: \\x1b[31m" in report


def test_the_progress_bar_takes_no_markup() -> None:
    from trainer.data.progress import progress_bar

    with progress_bar("pack [/x] {0}", 1, "[/y]"):
        pass


def test_the_text_of_a_summary_keeps_names(tmp_path: Path) -> None:
    run = made(tmp_path / "one", "a [b] c")
    assert "a [b] c" in summary(run).text
    assert io.StringIO(summary(run).markdown)
