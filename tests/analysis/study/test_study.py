"""The page of a study: statistics with known values, tables and sentences from kept journals, and the committed page made again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import false_discovery_control, ttest_rel

from launch import kept_journals
from tests.conftest import ROOT
from tests.support.journals import lines, write
from trainer.__main__ import main
from trainer.analysis.comparison.statistics import MeanInterval, PairedTest, holm, seeds_for
from trainer.analysis.history import history
from trainer.analysis.study import file as study_file
from trainer.analysis.study import step_times
from trainer.analysis.study.page import page, sentence
from trainer.analysis.study.picture import _lowest
from trainer.analysis.study.results import Question, result, top1_at
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.journal.file import JournalError

NOTHING = MeanInterval(math.nan, math.nan, math.nan, math.nan, 0)
STUDY = """
name: mini
question: Does <it> count?
config: base.yaml
reference: dense
arms: {dense: {}, sparse: {optim.lr: 2.0e-3}, later: {epochs: 3}}
"""
BASE = "name: base\nepochs: 4\nmodel: {name: deit_tiny_patch16_224}\ndata: {train: a.tar, validation: b.tar}\noptim: {warmup: 1ep}\n"


def test_holm_on_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, math.nan, 0.7])[0::2] == [1.0, 1.0] and math.isnan(holm([0.6, math.nan, 0.7])[1])
    with_open_questions = holm([0.01, math.nan, 0.02, math.nan])
    assert with_open_questions[0::2] == pytest.approx([0.04, 0.06]), "as if the open ones had p = 1"
    assert holm([0.02]) == [0.02] and holm([]) == []
    ps = [0.011, 0.2, 0.004, 0.03]
    assert all(ours >= theirs for ours, theirs in zip(holm(ps), false_discovery_control(ps), strict=True))  # stricter than FDR


def test_the_paired_test_is_scipys() -> None:
    ours, theirs = [0.91, 0.95, 0.90, 0.97, 0.92], [0.96, 0.97, 0.97, 0.98, 0.95]
    expected = ttest_rel(ours, theirs)
    found = PairedTest.of([a - b for a, b in zip(ours, theirs, strict=True)])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    for few in ([0.1], [0.0, 0.0], [0.1, 0.1], [0.0008, 0.0007], [0.1, 0.1, 0.1]):
        assert math.isnan(PairedTest.of(few).p) and math.isnan(PairedTest.of(few).difference.low)


@pytest.mark.parametrize(("effect", "pairs"), [(1.0, 10), (0.5, 34), (0.8, 15), (0.2, 199)])
def test_seeds_are_those_of_power_tables(effect: float, pairs: int) -> None:
    """Cohen's tables for the paired t-test, power .8, two-sided .05 (G*Power gives the same)."""
    assert seeds_for(0.01, 0.01 / effect) == pairs
    assert seeds_for(0.01, 0.0) == 2 and seeds_for(0.01, 1.0) is None


def question(differences: list[float], corrected: float = math.nan) -> Question:
    test = PairedTest.of(differences)
    return Question(
        "a", "b", PairedTest(test.difference, test.p, test.p if math.isnan(corrected) else corrected), NOTHING, NOTHING, NOTHING
    )


@pytest.mark.parametrize(
    ("differences", "corrected", "expected"),
    [
        ([-0.028, -0.020, -0.036], math.nan, "a is 2.8 points below b (95 % -4.8 to -0.8, n = 3, Holm p .026)."),
        ([-0.028, -0.020, -0.036], 0.3, "a is 2.8 points below b by its own test (95 % -4.8 to -0.8, n = 3, p .026), not after"),
        ([-0.01, 0.02, 0.005], math.nan, "+0.5 points (95 % -3.2 to +4.2, n = 3, Holm p .622); to find a difference of 1 point (power"),
        ([0.001, -0.001, 0.0005], math.nan, "the interval excludes differences of 1 point."),
        ([0.9, -0.9, 0.0], math.nan, "too much spread"),
        ([0.012], math.nan, "a and b: one pair, +1.2 points; no interval, no conclusion."),
        ([-0.0139, -0.0139], math.nan, "a and b: 2 pairs, -1.4 points; no interval, no conclusion."),
        ([0.0008, 0.0007], math.nan, "a and b: 2 pairs, +0.1 points; no interval, no conclusion."),
        ([-0.0139] * 3, math.nan, "a and b: 3 pairs with the same difference, -1.4 points; no interval, no conclusion."),
        ([], math.nan, "a and b: not measured."),
    ],
)  # fmt: skip
def test_sentences(differences: list[float], corrected: float, expected: str) -> None:
    assert expected in sentence(question(differences, corrected))


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two arms of three seeds: sparse is .02, .03 and .04 below dense, needs .8 of its multiply-adds and has twice the rate."""
    monkeypatch.chdir(tmp_path)
    Path("mini.yaml").write_text(STUDY)
    Path("base.yaml").write_text(BASE)
    for number in range(3):
        keep("dense", number, sparse=False)
        keep("sparse", number, lower=0.02 + 0.01 * number, rate=200.0)
    return tmp_path


def keep(arm: str, number: int, lower: float = 0.0, **of: Any) -> None:
    made = [dict(line) for line in lines(seed=number, **of)]
    made[0]["config"] = load("base.yaml").resolved() | {"name": f"mini-{arm}-seed{number}", "seed": number}
    for line in made:
        if line["kind"] == "eval":
            line["top1"] -= lower
    folder = write(Path("runs") / f"{arm}{number}", made)
    kept_journals.keep(folder / "journal.jsonl", kept_journals.path_of("kept", "mini", arm, number))


def test_a_row_per_arm_and_a_test_per_question(mini: Path) -> None:
    found = result(study_file.read("mini.yaml"), Path("kept"))
    dense, sparse = found.arms
    assert dense.name == "dense" and list(sparse.runs) == [0, 1, 2]
    assert sparse.multiply_adds.mean == pytest.approx((800 * 100 + 400 * 50) / (1600 * 100))
    assert sparse.time.mean == pytest.approx(1200 / 200 / (1600 / 100)) and sparse.images == 1200
    assert sparse.worst_class.mean == pytest.approx(0.2)
    one, later = found.questions
    assert one.test.difference.mean == pytest.approx(-0.03) and one.test.holm == 2 * one.test.p  # `later` counts too
    assert one.worst_class.mean == pytest.approx(0.0)
    assert later.test.difference.count == 0 and math.isnan(later.test.holm)
    # 100,000 multiply-adds: dense is at 1,000 images, half way between epochs 2 (.675 + .01) and 3 (.7875 + .01), sparse at its end
    assert one.equal_multiply_adds.mean == pytest.approx(0.84375 - (0.675 + 0.7875) / 2 - 0.03)
    assert found.notes == ["sparse, seed 0, 1, 2: other settings than the study's file: optim.lr=0.001 (file: 0.002)"]


def test_bytes_of_the_whole_network_are_shown_where_arms_differ_in_them(mini: Path) -> None:
    """1,000 parameters; sparse keeps a quarter of 2,000 bytes. Then its network is a dense one of 900."""
    assert "weights (bytes)" not in page([result(study_file.read("mini.yaml"), Path("kept"))], Path("kept"), "", {})

    def pruned(made: list[dict]) -> list[dict]:
        line = {"kind": "weights", "time": made[-1]["time"], "attempt": 0, "epoch": 3, "step": 30, "progress": 3.0}
        return [*made[:-1], line | {"kept": 0.25, "bytes": {"dense": 2000, "block": 600, "csr": 1200}}, made[-1]]

    def smaller(made: list[dict]) -> list[dict]:
        return [made[0] | {"parameters": 900}, *(line for line in made[1:] if line["kind"] != "weights")]

    for name, change, stored, shown in (("pruned", pruned, 2600.0, "0.650"), ("smaller", smaller, 3600.0, "0.900")):
        for number in range(3):
            kept = kept_journals.path_of("kept", "mini", "sparse", number)
            made = change(list(kept_journals.lines(kept)))
            kept.unlink()
            kept_journals.keep(write(Path("runs") / f"{name}{number}", made) / "journal.jsonl", kept)
        found = result(study_file.read("mini.yaml"), Path("kept"))
        assert [(arm.stored, arm.stored_share) for arm in found.arms] == [(4000.0, 1.0), (stored, stored / 4000)]
        text = page([found], Path("kept"), "", {})
        row = next(line for line in text.splitlines() if line.startswith("| sparse | 0, 1, 2 |"))
        assert "| weights (bytes) | weights |" in text and f"| {stored:,.0f} | {shown} |" in row
        assert "of pruned layers the groups that are left with their indices" in text


def test_a_view_is_the_same_runs_at_another_density(mini: Path) -> None:
    path = Path("mini.yaml")
    path.write_text(path.read_text() + "views: {half: [sparse, 0.5], none: [sparse, 0.7]}\nquestions: [[half, dense]]\n")
    for number in range(3):
        kept = kept_journals.path_of("kept", "mini", "sparse", number)
        made = list(kept_journals.lines(kept))
        last = next(line for line in reversed(made) if line["kind"] == "eval")
        made.append(last | {"kind": "density", "keep_tokens": 0.5, "top1": last["top1"] - 0.1})
        made.append(last | {"kind": "density", "keep_tokens": 0.35, "top1": 0.0})
        kept.unlink()
        folder = write(Path("runs") / f"half{number}", made)
        kept_journals.keep(folder / "journal.jsonl", kept)
    found = result(study_file.read("mini.yaml"), Path("kept"))
    assert [arm.name for arm in found.arms] == ["dense", "sparse", "half"]
    (asked,) = found.questions
    assert asked.test.difference.mean == pytest.approx(-0.13)
    path.write_text(path.read_text().replace("[[half,", "[[haf,"))
    with pytest.raises(ConfigError, match="'haf': unknown arm; valid values: dense, sparse, later, half, none"):
        study_file.read("mini.yaml")


def test_top1_at_a_cost(mini: Path) -> None:
    run = history(Path("kept/mini/dense-seed0.jsonl.xz"))
    assert top1_at(run, lambda point: float(point.images), 400) == pytest.approx(0.46)
    assert top1_at(run, lambda point: float(point.images), 600) == pytest.approx((0.46 + 0.685) / 2)
    assert top1_at(run, lambda point: float(point.images), 1600) == pytest.approx(0.85375)
    assert math.isnan(top1_at(run, lambda point: float(point.images), 300))
    assert math.isnan(top1_at(run, lambda point: float(point.images), 1700))


def test_the_page_holds_the_numbers_and_is_the_same_each_time(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--study", "mini.yaml", "--journals", "kept", "--out", "page/study.md"]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == ["page/study.md", "page/study/mini.png"]
    text, picture = Path("page/study.md").read_text(), Path("page/study/mini.png").read_bytes()
    assert "| sparse | 0, 1, 2 | 82.47 ± 0.90 | 20.00 ± 0.00 | 1,200 | 0.625 |" in text
    assert "| sparse | dense | 3 | -3.00 [-5.48, -0.52] | .035 | .070 | +0.00 [+0.00, +0.00] |" in text
    assert "- sparse is 3.0 points below dense by its own test (95 % -5.5 to -0.5, n = 3, p .035)" in text
    assert "Questions: 2, over which Holm corrects; 1 of them have three pairs or more." in text
    assert "later and dense" not in text and "Not measured: later." in text
    assert "6 runs on 2 x cpu; torch 2.15.0; started 2023-11-14; commit c0ffee" in text
    assert "| multiply-adds |\n" in text and "| at equal multiply-adds |\n" in text, "times of a loaded machine are not shown"
    assert "Does &lt;it&gt; count?" in text and "](study/mini.png)" in text
    assert str(mini) not in text and len(picture) < 100_000
    assert main(words) == 0
    assert Path("page/study.md").read_text() == text and Path("page/study/mini.png").read_bytes() == picture


def test_times_of_a_quiet_study_count(mini: Path) -> None:
    Path("mini.yaml").write_text(STUDY + "quiet: true\n")
    text = page([result(study_file.read("mini.yaml"), Path("kept"))], Path("kept"), "x", {})
    assert "| multiply-adds | time |" in text and "| at equal multiply-adds | at equal time |" in text
    assert "| 1,200 | 0.625 | 0.375 |" in text and "dense trains for 0:16 per run." in text


MEASURED = {
    "device": "CPU", "precision": "float32", "threads": 1, "torch": "2.15.0", "date": "2026-11-23", "commit": "c0ffeec0ffee", "rounds": 30,
}  # fmt: skip


def measured(arms: dict[str, Any], **ratios: float) -> Path:
    path = Path("kept/mini/step_times.json")
    file = study_file.read("mini.yaml")
    settings = {arm: step_times.fingerprint(step_times.configured(file, arm)) for arm in arms}
    rows = {row: {"ratio": ratio} for row, ratio in ratios.items()}
    path.write_text(json.dumps(rows | {"arms": arms, "measured": MEASURED | {"settings": settings}}))
    return path


def test_times_are_calculated_from_step_times_measured_alone(mini: Path) -> None:
    """Dense: 1,600 images. Sparse: 800 dense ones, then 400, of which those of epoch 3 take .5 and those of epoch 4 .3 of a dense one."""
    arms = {
        "dense": [[0, 4, 1.0, "dense"]],
        "sparse": [[0, 2, 1.0, "dense"], [2, 3, 1.0, "first"], [3, 4, 0.5, "a"], [3, 4, 0.5, "b"]],
    }
    measured(arms, dense=1.0, first=0.5, a=0.2, b=0.4)
    found = result(study_file.read("mini.yaml"), Path("kept"))
    _, sparse = found.arms
    assert sparse.time.mean == pytest.approx((800 + 200 * 0.5 + 200 * 0.3) / 1600)
    # 960: dense is at .4 between epochs 2 and 3, sparse at its end
    ours, theirs = 0.84375 - 0.03, 0.675 + 0.4 * (0.7875 - 0.675)
    (one, _) = found.questions
    assert one.equal_time.mean == pytest.approx(ours - theirs)
    text = page([found], Path("kept"), "x", {})
    assert "| sparse | 0, 1, 2 | 82.47 ± 0.90 | 20.00 ± 0.00 | 1,200 | 0.625 | 0.600 |" in text and "| at equal time |" in text
    assert "(CPU, 1 thread, float32, torch 2.15.0, 2026-11-23, commit c0ffeec, 30 rounds)." in text
    measured({"dense": arms["dense"]}, dense=1.0)
    _, sparse = result(study_file.read("mini.yaml"), Path("kept")).arms
    assert math.isnan(sparse.time.mean), "an arm that was not measured has no time"


def test_times_of_other_settings_do_not_count(mini: Path) -> None:
    arms = {"dense": [[0, 4, 1.0, "dense"]], "sparse": [[0, 4, 1.0, "dense"]]}
    measured(arms, dense=1.0)
    assert all(arm.time.mean > 0 for arm in result(study_file.read("mini.yaml"), Path("kept")).arms)
    Path("mini.yaml").write_text(STUDY.replace("sparse: {optim.lr: 2.0e-3}", "sparse: {tokens: {method: topk, keep: 0.5}}"))
    found = result(study_file.read("mini.yaml"), Path("kept"))
    assert [math.isnan(arm.time.mean) for arm in found.arms] == [False, True]
    assert "sparse: not timed with the settings that the file has now; measure again with `trilevel bench study`" in found.notes


def test_a_probed_image_takes_a_third_of_a_training_image(mini: Path) -> None:
    run = history(Path("kept/mini/dense-seed0.jsonl.xz"))
    probe = replace(run.of("step")[4], line={"kind": "probe", "probed": 90, "multiply_adds": 50.0})
    times = step_times.StepTimes({"dense": [[0, 4, 1.0, "dense"]]}, {"dense": 1.0}, MEASURED, {})
    before, after = times.cost("dense", run), times.cost("dense", replace(run, points=run.points | {"probe": [probe]}))
    assert before and after
    assert after(run.of("step")[3]) == before(run.of("step")[3]) and after(run.last) == pytest.approx(
        before(run.last) + 90 * 0.5 / 3
    )


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "no", '{"arms": {"dense": [[0, 4, 1.0, "row"]]}, "measured": {}}', '{"arms": {"dense": [[0]]}, "measured": {}}',
        '{"row": {"ratio": -1}, "arms": {"dense": [[0, 4, 1.0, "row"]]}, "measured": {}}',
        '{"row": {"ratio": NaN}, "arms": {"dense": [[0, 4, 1.0, "row"]]}, "measured": {}}',
        '{"row": {"ratio": 1}, "arms": {"dense": [["a", 4, 1.0, "row"]]}, "measured": {}}',
    ],
)  # fmt: skip
def test_step_times_that_are_not_a_measurement_are_refused(mini: Path, text: str) -> None:
    measured({}).write_text(text)
    with pytest.raises(ConfigError, match=r"step_times\.json: not a result of `trilevel bench study` .* or remove it"):
        result(study_file.read("mini.yaml"), Path("kept"))


def test_a_question_asked_after_the_results_is_marked_and_changes_no_correction(mini: Path) -> None:
    Path("mini.yaml").write_text(STUDY + "questions: [[sparse, dense]]\nlater: [[dense, sparse]]\n")
    found = result(study_file.read("mini.yaml"), Path("kept"))
    asked, later = found.questions
    assert asked.test.holm == asked.test.p and math.isnan(later.test.holm) and later.test.p == asked.test.p
    text = page([found], Path("kept"), "x", {})
    assert "Questions: 1, over which Holm corrects, and 1 later ones; 2 of them have three pairs or more." in text
    assert "| dense | sparse | 3 | +3.00 [+0.52, +5.48] | .035 | later |" in text
    assert "- dense and sparse: +3.0 points (95 % +0.5 to +5.5, n = 3, p .035); asked after results were known." in text


def test_a_study_without_journals_is_not_measured(mini: Path) -> None:
    found = result(study_file.read("mini.yaml"), Path("nowhere"))
    assert "Not measured: no kept journal." in page([found], Path("nowhere"), "x", {})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("reference: dense", "reference: dens", "'dens': unknown arm; valid values: dense, sparse, later"),
        ("question: Does <it> count?", "", "question: required key is missing"),
        ("arms:", "questions: [[dense, spars]]\narms:", "'spars': unknown arm"),
        ("arms:", "later: [[dense, spars]]\narms:", "'spars': unknown arm"),
        ("arms:", "arms: [", "not valid YAML"),
    ],
)
def test_files_that_are_refused(mini: Path, old: str, new: str, expected: str) -> None:
    Path("mini.yaml").write_text(STUDY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(expected)):
        study_file.read("mini.yaml")


def test_what_cannot_be_read_is_named(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--study", "none.yaml"]) != 0
    assert "--study none.yaml: cannot be read" in capsys.readouterr().err
    assert main(["compare", "--study", "mini.yaml", "--base", "x"]) != 0
    assert "compare --study with base" in capsys.readouterr().err
    path = Path("kept/mini/dense-seed0.jsonl.xz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(JournalError, match=r"dense-seed0\.jsonl\.xz: not a whole \.xz file"):
        result(study_file.read("mini.yaml"), Path("kept"))


def test_a_page_of_other_studies_is_not_replaced(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--study", "mini.yaml", "--journals", "nowhere"]) == 2 and not Path("nowhere.md").exists()
    assert "no kept journals of mini in nowhere; name their folder with --journals DIR" in capsys.readouterr().err
    Path("kept.md").write_text("# Studies\n\n## mini\n\n## levels\n")
    assert main(["compare", "--study", "mini.yaml", "--journals", "kept"]) == 2
    assert (
        "kept.md has other studies too (levels), which would be lost; name another page with --out" in capsys.readouterr().err
    )
    assert Path("kept.md").read_text().endswith("## levels\n")
    assert main(["compare", "--study", "mini.yaml", "--journals", "kept", "--out", "mini.md"]) == 0
    Path("kept.md").write_text(Path("mini.md").read_text())
    assert main(["compare", "--study", "mini.yaml", "--journals", "kept"]) == 0, "its own page is written again"


def test_kept_journals_hold_what_the_original_says(mini: Path) -> None:
    kept, original = history(Path("kept/mini/sparse-seed1.jsonl.xz")), history(Path("runs/sparse1"))
    assert kept.last.multiply_adds == original.last.multiply_adds and kept.last.elapsed == original.last.elapsed
    assert json.dumps(kept.of("eval")[-1].line) == json.dumps(original.of("eval")[-1].line)


def test_both_readers_of_a_study_agree() -> None:
    from launch import study_file as launched

    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            ours, theirs = study_file.read(path), launched.read(str(path))
        assert (ours.name, ours.config, ours.reference) == (theirs.name, theirs.config, theirs.reference)
        assert list(ours.arms) == list(theirs.arms) and [*ours.questions, *ours.later] == list(theirs.questions)


def test_the_committed_page_is_made_from_the_committed_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path("docs/results/study.md").read_text()
    command = re.search(r"^trilevel (compare --study .*) --out docs/results/study.md$", text, re.M)
    assert command
    assert main([*command[1].split(), "--out", str(tmp_path / "study.md")]) == 0
    assert (tmp_path / "study.md").read_text().replace(str(tmp_path), "docs/results") == text
    for path in tmp_path.rglob("*.png"):
        assert (ROOT / "docs" / "results" / "study" / path.name).is_file()


@pytest.mark.parametrize(
    ("scores", "base", "lowest"),
    [([0.8], 0.9, 78.0), ([0.9, 0.88], None, 87.0), ([0.895, 0.9], None, 88.5), ([0.1], 0.9, 0.0)],
)
def test_a_plot_begins_below_its_lowest_arm_by_a_fifth_of_the_range(
    scores: list[float], base: float | None, lowest: float
) -> None:
    arms: Any = [SimpleNamespace(top1=MeanInterval.of([score])) for score in scores]
    of_base: Any = base and SimpleNamespace(top1=MeanInterval.of([base]))
    assert _lowest(arms, of_base) == pytest.approx(lowest)
