"""Runs side by side: what is saved at equal top-1, seeds as groups, what makes a comparison unsafe, the page in one file."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console as Terminal

from tests.support.journals import CONFIG, START, lines, write
from tests.support.recorded_configs import recorded
from trainer.__main__ import main
from trainer.analysis.comparison.figures import facts
from trainer.analysis.comparison.groups import NothingToCompare, compare, cost_to_reach, final
from trainer.analysis.comparison.page import comma_separated, markdown, page, rows, table, warnings
from trainer.analysis.comparison.page import write as write_page
from trainer.analysis.comparison.plots import accuracy, per_class, throughput
from trainer.analysis.comparison.statistics import MeanInterval
from trainer.analysis.history import history


def run(folder: Path, name: str, seed: int = 0, start: dict[str, Any] | None = None, **of: Any) -> Path:
    """A made-up run; what it differs in from START goes into its start line, what `lines` takes into the rest."""
    first, *rest = lines(seed=seed, **of)
    config = first["config"] | {"name": name, "tokens": {"keep": 0.5 if of.get("sparse", True) else 1.0}}
    return write(folder / name, [first | {"config": config} | (start or {}), *rest])


@pytest.fixture
def both(tmp_path: Path) -> list[Path]:
    """Dense and sparse, three seeds each; the sparse ones at twice the rate."""
    dense = [run(tmp_path, f"dense-s{seed}", seed, sparse=False) for seed in range(3)]
    return dense + [run(tmp_path, f"sparse-s{seed}", seed, rate=200.0) for seed in range(3)]


def test_seeds_are_groups_and_savings_are_what_the_journals_say(both: list[Path]):
    found = compare(both)
    assert [group.name for group in found.groups] == ["dense", "sparse"] and found.base.name == "dense"
    dense, sparse = found.groups
    assert [len(group.runs) for group in found.groups] == [3, 3] and dense.against is None
    held = sparse.against
    assert held and held.paired == 3 and warnings(found) == []
    assert held.top1.mean == pytest.approx(0) and math.isnan(held.top1.high)  # the same curve per epoch: no interval
    # dense 1,600 images at 100/s and four evaluations of .5 s; sparse 1,200 at 200/s
    assert held.whole["time"].mean == pytest.approx(18 / 8) and held.whole["images"].mean == pytest.approx(1600 / 1200)
    assert held.whole["multiply-adds"].mean == pytest.approx(1600 * 100 / (800 * 100 + 400 * 50))
    assert held.equal["images"].mean == pytest.approx(4 / 3) and held.at.mean == pytest.approx(0.85475)
    assert compare(both, base="sparse").groups[1].against.whole["time"].mean == pytest.approx(8 / 18)  # type: ignore[union-attr]
    assert compare(both, base="sparse-s1").base.name == "sparse"


def test_bytes_are_of_the_whole_network_for_dense_runs_too(tmp_path: Path):
    """Two runs whose pruned layers are not the same, and a dense one: what is stored of all 1,000 parameters."""
    folders = [run(tmp_path, "dense", sparse=False)]
    for name, sizes in {"mlp": {"dense": 2000, "block": 600}, "all": {"dense": 3200, "block": 1700}}.items():
        first, *rest = lines(sparse=False)
        line = {"kind": "weights", "time": rest[-1]["time"], "attempt": 0, "epoch": 3, "kept": 0.5, "bytes": sizes}
        config = first["config"] | {"name": name, "weights": {"layers": [name]}}
        folders.append(write(tmp_path / name, [first | {"config": config}, *rest[:-1], line, rest[-1]]))
    found = compare(folders)
    assert [row["weights MB"] for row in rows(found)] == ["0.004", "0.0026", "0.0025"]
    assert [row["weights_bytes"] for row in facts(found)] == [4000, 2600, 2500]


def test_the_base_is_the_one_dense_run_else_the_first(both: list[Path], tmp_path: Path):
    assert compare(both[::-1]).base.name == "dense"
    other = run(tmp_path, "wider", sparse=False, start={"config": CONFIG | {"name": "wider", "model": {"name": "wide"}}})
    assert compare([*both[::-1], other]).base.name == "sparse"  # two are dense: the first that was named


def test_spread_is_students():
    spread = MeanInterval.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd) == (2, 1) and spread.high - 2 == 2 - spread.low == pytest.approx(4.302653 / math.sqrt(3))
    ratio = MeanInterval.of_ratios([0.2, 5.0])  # once a fifth, once five times: no speedup, and none below 0
    assert ratio.mean == pytest.approx(1) and 0 < ratio.low < 1 < ratio.high and ratio.low * ratio.high == pytest.approx(1)
    assert (
        math.isnan(MeanInterval.of([1.0]).low)
        and math.isnan(MeanInterval.of_ratios([]).mean)
        and math.isnan(MeanInterval.of([]).mean)
    )


def test_reached_by_straight_line_between_evaluations(tmp_path: Path):
    one = history(run(tmp_path, "one", sparse=False))  # EMA: .46, .685, .7975, .85375 after 400, 800, ... images
    assert cost_to_reach(one, 0.46, "images") == cost_to_reach(one, 0.1, "images") == 400  # unknown before the first evaluation
    assert cost_to_reach(one, (0.46 + 0.685) / 2, "images") == pytest.approx(600)
    assert math.isnan(cost_to_reach(one, 0.9, "images"))
    longer = run(tmp_path, "longer", sparse=False, epochs=5)  # ends higher: equal at what the first one reached
    held = compare([tmp_path / "one", longer]).groups[1].against
    assert held and held.at.mean == pytest.approx(0.85375) and held.equal["images"].mean == pytest.approx(1)
    assert held.whole["images"].mean == pytest.approx(4 / 5)


def test_a_dip_between_evaluations_does_not_move_where_a_score_was_reached(tmp_path: Path):
    """.5, .4, .6 after 400, 800 and 1,200 images: .55 is half way from the best so far, .5, to .6."""
    dip = iter((0.5, 0.4, 0.6, 0.6))
    journal = [line | {"top1": next(dip)} if line["kind"] == "eval" and line["ema"] else line for line in lines(sparse=False)]
    one = history(write(tmp_path / "dip", journal))
    assert cost_to_reach(one, 0.55, "images") == pytest.approx(1000)
    assert cost_to_reach(one, 0.5, "images") == 400 and cost_to_reach(one, 0.6, "images") == 1200


def test_the_score_of_a_run_is_its_last_one_not_its_best(tmp_path: Path):
    worse = iter((0.5, 0.8, 0.9, 0.7))
    journal = [line | {"top1": next(worse)} if line["kind"] == "eval" and line["ema"] else line for line in lines(sparse=False)]
    assert final(history(write(tmp_path / "worse", journal))) == 0.7


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"data": {"validation": {"fingerprint": "x"}, "train": START["data"]["train"]}},
            "validation set: validation-abc in a, x in b",
        ),
        (
            {"data": {"train": {"fingerprint": "x"}, "validation": START["data"]["validation"]}},
            "the runs trained on different images",
        ),
        ({"device": "H200"}, "device: cpu in a, H200 in b; times and device hours are not comparable"),
        ({"world": 8}, "processes: 2 in a, 8 in b; compare device hours"),
        ({"pixels": ["scaled decode"]}, "options that change pixels: none in a, scaled decode in b"),
        ({"commit": "beef"}, "commit: c0ffee in a, beef in b"),
        ({"dirty": True}, "b ran with uncommitted changes"),
        ({"config": CONFIG | {"name": "b", "model": {"image_size": 64}}}, "image size: unknown in a, 64 in b"),
    ],
)
def test_what_makes_runs_hard_to_compare_is_reported(tmp_path: Path, other: dict[str, Any], message: str):
    found = compare([run(tmp_path, "a", sparse=False), run(tmp_path, "b", start=other)])
    assert any(message in text for text in warnings(found)), warnings(found)
    assert message.split(";")[0] in markdown(found)


def test_unfinished_runs_and_seeds_not_shared_are_reported(tmp_path: Path):
    a = run(tmp_path, "a", sparse=False)
    journal = run(tmp_path, "b", seed=7) / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    found = compare([a, tmp_path / "b"])
    assert found.groups[1].against and not found.groups[1].against.paired
    message = " | ".join(warnings(found))
    assert "b is not finished (running)" in message and "no seed in common" in message


def test_an_unfinished_run_is_a_group_of_its_own_without_whole_run_numbers(both: list[Path], tmp_path: Path):
    """Half of a run once counted as a whole one: multiply-adds x 1.74 while it ran, 1.13 after it."""
    journal = tmp_path / "sparse-s2" / "journal.jsonl"
    half = [line for line in journal.read_text().splitlines(keepends=True) if '"epoch": 3' not in line and '"end"' not in line]
    journal.write_text("".join(half))
    found = compare([both[5], *both[:5]])  # named first: it is no base all the same
    assert [(group.name, len(group.runs)) for group in found.groups] == [
        ("dense", 3),
        ("sparse-s2 (not finished)", 1),
        ("sparse", 2),
    ]
    _, cut, whole = found.groups
    assert cut.against and whole.against and not cut.finished and whole.finished
    of_cut = (cut.against.top1, *cut.against.whole.values(), *cut.against.equal.values())
    assert all(math.isnan(spread.mean) for spread in of_cut), "its schedule was made for more epochs"
    assert whole.against.whole["images"].mean == pytest.approx(1600 / 1200)
    row = {row["run"]: row for row in rows(found)}["sparse-s2 (not finished)"]
    assert row["against base"] == row["whole run: time x"] == "" and row["top-1 %"]
    two = [run(tmp_path / "at", name, sparse=name == "b") / "journal.jsonl" for name in "ab"]
    for path in two:  # both stopped at the same epoch, as dry runs do
        path.write_text(path.read_text().replace('"finished"', '"stopped"'))
    against = compare([path.parent for path in two]).groups[1].against
    assert against and against.whole["images"].mean == pytest.approx(1600 / 1200)


def test_mfu_is_relative_to_one_rate_of_the_machine(tmp_path: Path):
    """Two runs of one machine, the second started beside other work: its rate was measured at half, so its MFU at twice."""
    for name, rate, mfu in (("quiet", 0.06, 0.1), ("loaded", 0.03, 0.2)):
        path = run(tmp_path, name, sparse=name == "loaded", start={"matrix_tflops": rate}) / "journal.jsonl"
        path.write_text(path.read_text().replace('"lr": 0.001', f'"lr": 0.001, "mfu": {mfu}'))
    found = rows(compare([tmp_path / "quiet", tmp_path / "loaded"]))
    assert {row["MFU %"] for row in found} == {"10.0"}
    alone = history(tmp_path / "loaded")
    assert alone.mfu() == pytest.approx(0.2) and alone.matrix_tflops == 0.03
    path = tmp_path / "loaded" / "journal.jsonl"
    path.write_text(path.read_text().replace('"status": "finished"', '"matrix_tflops": 0.06, "status": "finished"'))
    again = history(tmp_path / "loaded")  # measured again at the end, when the machine was quiet
    assert again.mfu() == pytest.approx(0.1) and again.matrix_tflops == 0.06
    other = run(tmp_path, "gpu", start={"matrix_tflops": 600.0, "device": "H200"}) / "journal.jsonl"
    other.write_text(other.read_text().replace('"lr": 0.001', '"lr": 0.001, "mfu": 0.4'))
    assert [row["MFU %"] for row in rows(compare([tmp_path / "quiet", other.parent]))] == ["10.0", "40.0"]


def test_every_run_of_a_group_is_looked_at(tmp_path: Path):
    """Three seeds on one data set, one on another, one of the three cut short: a mean over all would be of nothing."""
    elsewhere = {"data": {split: {"fingerprint": "x"} for split in ("train", "validation")}, "dirty": True}
    found = compare([run(tmp_path, f"s{seed}", seed, start=elsewhere if seed == 3 else None) for seed in range(4)])
    assert [[r.name for r in group.runs] for group in found.groups] == [["s0", "s1", "s2"], ["s3"]]
    message = " | ".join(warnings(found))
    assert "validation set: validation-abc in s0, s1 and s2, x in s3" in message and "s3 ran with uncommitted" in message
    journal = tmp_path / "s1" / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"finished"', '"failed"'))
    apart = compare([tmp_path / "s0", tmp_path / "s1"])
    assert [group.name for group in apart.groups] == ["s0", "s1 (not finished)"]
    assert "s1 is not finished (failed): the last top-1 is not the final one" in warnings(apart)
    assert "s1 is not finished" in page(apart)
    alone = compare([tmp_path / "s1"])
    assert warnings(alone) == ["s1 is not finished (failed): the last top-1 is not the final one"]


def test_settings_changed_at_a_resume_and_skipped_steps_are_reported(tmp_path: Path):
    whole = list(lines())
    first = [line for line in whole if line.get("step", 0) <= 20 and line["kind"] != "end"]
    again = [whole[0] | {"world": 4, "config": CONFIG | {"epochs": 4, "optim": {"lr": 5e-4, "name": "adamw"}, "stop_at": 7}}]
    again += [{"kind": "resume", "step": 20}, {"kind": "skipped", "step": 21, "skipped": 1, "in_row": 1}]
    again += [line for line in whole if line.get("step", 0) > 20]
    time = first[-1]["time"]
    write(tmp_path / "a", [*first, *({"time": time} | line | {"attempt": 1} for line in again)])
    message = warnings(compare([tmp_path / "a"]))
    assert message == [
        "tri: 1 of 30 steps were skipped (non-finite loss or gradient)",
        "tri changed between its attempts: processes 2 -> 4, optim.lr 0.001 -> 0.0005",
    ]


def test_a_run_of_an_earlier_version_resumes_without_a_changed_setting(tmp_path: Path):
    """It recorded the settings of all methods before, and those of its own now."""
    whole = list(lines())
    levels = {"examples": {"method": "infobatch", "removed": 0.3}}
    now = {"method": "infobatch", "removed": 0.3, "anneal": 0.0, "rule": "clear"}
    today = {"examples": now, "tokens": {"method": "all", "blocks": [3, 6, 9], "position": "attention"}}
    today |= {"connections": {"method": "all"}, "plan": {"method": "constant"}}
    before = [whole[0] | {"config": recorded(CONFIG, **levels)}, *(line for line in whole[1:] if 0 < line.get("step", 0) <= 20)]
    after = [whole[0] | {"config": CONFIG | today}, {"kind": "resume", "step": 20}]
    after += [line for line in whole if line.get("step", 0) > 20]
    before, time = [line for line in before if line["kind"] != "end"], whole[-1]["time"]
    write(tmp_path / "a", [*before, *({"time": time} | line | {"attempt": 1} for line in after)])
    assert warnings(compare([tmp_path / "a"])) == []


def test_runs_without_a_score_and_seeds_without_a_partner_are_named(both: list[Path], tmp_path: Path):
    write(tmp_path / "young", [next(lines())])
    message = warnings(compare([*both[:3], *both[4:], tmp_path / "young"]))
    assert message[0] == f"left out, without an evaluation: {tmp_path}/young"
    assert message[1:] == ["sparse and dense have 2 of 3 seeds in common: differences are over these alone"]


def test_groups_lose_their_seed_from_the_name_and_nothing_else(tmp_path: Path):
    same = [run(tmp_path / f"{seed}", "keep_0.7", seed) for seed in range(2)]  # one name, two folders
    assert compare(same).base.name == "keep_0.7"
    assert compare([run(tmp_path, f"keep_0.7-seed{seed}", seed) for seed in range(2)]).base.name == "keep_0.7"
    assert compare([run(tmp_path, name, seed) for seed, name in enumerate(("wide10", "wide20"))]).base.name == "wide10"


def test_without_a_common_seed_there_is_no_interval(both: list[Path], tmp_path: Path):
    found = compare([*both[:3], run(tmp_path, "other", seed=7)])
    row = rows(found)[1]
    assert "no seed in common" in warnings(found)[-1] and not any("[" in value for value in row.values())


def test_refusals_name_a_remedy(tmp_path: Path):
    write(tmp_path / "young", [next(lines())])
    with pytest.raises(NothingToCompare, match=r"no evaluation in .*young.*evaluate.every"):
        compare([tmp_path / "young"])
    with pytest.raises(NothingToCompare, match="valid values: a"):
        compare([run(tmp_path, "a")], base="b")


def test_all_formats_have_the_same_content_and_the_page_is_one_file(both: list[Path], tmp_path: Path):
    found = compare(both)
    message = rows(found)
    assert message[0]["run"] == "dense (base)" and message[1]["top-1 %"] == "85.47 ± 0.10"
    assert message[1]["whole run: time x"] == "2.25 [2.25, 2.25]" and message[1]["kept tokens %"] == "92"
    assert list(csv.DictReader(io.StringIO(comma_separated(found)))) == message
    out = io.StringIO()
    Terminal(file=out, width=120).print(table(found))
    for text in (out.getvalue(), markdown(found), page(found)):
        assert "85.47 ± 0.10" in text and "2.25 [2.25, 2.25]" in text
    files = write_page(found, tmp_path / "out")
    assert [file.name for file in files] == ["compare.html", "compare.md", "compare.csv"]
    text = files[0].read_text()
    assert text.count("<svg") == text.count("</svg>") == 2 and "<script" not in text
    loaded = [url for url in re.findall(r'(?:src|href)="([^"]*)"', text) if not url.startswith("#")]
    assert loaded == [] and "@import" not in text and "url(http" not in text


def test_no_curve_runs_through_a_legend_and_hours_are_readable(both: list[Path], monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    monkeypatch.setattr("trainer.analysis.comparison.plots._svg", lambda figure: drawn.append(figure) or "")
    accuracy(compare(both))
    throughput(compare(both))
    for figure in drawn:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["dense", "sparse"]
        assert not any(axes.bbox.overlaps(legend.get_window_extent()) for axes in figure.axes)
    assert drawn[0].axes[1].get_xlabel() == "device time (seconds)"  # 36 of them, not .01 hours


def test_no_two_of_many_runs_are_drawn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    monkeypatch.setattr("trainer.analysis.comparison.plots._svg", lambda figure: drawn.append(figure) or "")
    found = compare([run(tmp_path, f"r{i}", start={"config": CONFIG | {"name": f"r{i}", "epochs": i}}) for i in range(12)])
    accuracy(found)
    throughput(found)
    for figure in drawn:
        assert len({(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}) == 12


def test_classes_that_moved_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, values in (("a", [0.9, 0.8, 0.7]), ("b", [0.9, 0.5, 0.8])):
        path = run(tmp_path, name, sparse=name == "b") / "journal.jsonl"
        path.write_text(path.read_text().replace('"top5"', f'"per_class": {values}, "top5"'))
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert per_class(found).startswith("<svg") and page(found).count("<svg") == 3
    assert per_class(compare([tmp_path / "a"])) == ""
    journal = tmp_path / "b" / "journal.jsonl"
    journal.write_text(journal.read_text().replace("[0.9, 0.5, 0.8]", '["NaN", 0.5, 0.8]'))  # a class without images
    assert "class 0" not in per_class(compare([tmp_path / "a", tmp_path / "b"]))
    drawn: list[Figure] = []
    monkeypatch.setattr("trainer.analysis.comparison.plots._svg", lambda figure: drawn.append(figure) or "")
    per_class(found)
    (axes,) = drawn[0].axes
    bars: Any = axes.patches
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert [bar.get_width() for bar in bars] == pytest.approx([-30, 10, 0])  # the largest change first, in percentage points
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["class 1", "class 2", "class 0"]


def test_the_terminal_names_what_makes_runs_hard_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [run(tmp_path, "a", sparse=False), run(tmp_path, "b", start={"device": "H200"})]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert "warning: device: cpu in a, H200 in b; times and device hours are not comparable" in capsys.readouterr().out


def test_names_are_escaped(tmp_path: Path):
    text = page(compare([run(tmp_path, "a"), run(tmp_path, "b", start={"commit": "<script>alert(1)</script>"})]))
    assert "<script" not in text and "&lt;script&gt;" in text
