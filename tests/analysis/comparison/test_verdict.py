"""The sentences of a comparison: what is shown, what the seeds leave open and how many more would tell, and the settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.journals import lines, write
from trainer.analysis.comparison.groups import Comparison, compare
from trainer.analysis.comparison.page import markdown, page
from trainer.analysis.comparison.verdict import differing, sentences


def pair(folder: Path, off: list[float], rate: float = 200.0, **settings: Any) -> Comparison:
    """Dense runs of seeds 0, 1, ... beside sparse ones whose scores are off by `off`, at `rate` images/s for 100."""
    paths = []
    for name, shifts, of in (("dense", [0.0] * len(off), {"sparse": False}), ("sparse", off, {"rate": rate})):
        for seed, shift in enumerate(shifts):
            first, *rest = lines(seed=seed, **of)
            own = {"tokens": {"keep": 0.5}} | settings if name == "sparse" else {"tokens": {"keep": 1.0}}
            config = first["config"] | {"name": f"{name}-s{seed}"} | own
            rest = [line | {"top1": line["top1"] + shift} if line["kind"] == "eval" else line for line in rest]
            paths.append(write(folder / f"{name}-s{seed}", [first | {"config": config}, *rest]))
    return compare(paths)


def test_too_few_seeds_are_named_with_how_many_more_would_do(tmp_path: Path):
    """The wanted sentence: two seeds, not distinguishable from zero, so many more would show a point."""
    (text,) = sentences(pair(tmp_path, [-0.02, 0.01]))
    assert text.startswith(
        "sparse against dense: -0.50 points top-1 (95 % -19.56 to +18.56, 2 seeds) is not distinguishable from zero; "
    )
    assert "more seeds would show 1 point in 4 of 5 cases" in text
    more = int(text.partition("zero; ")[2].split()[0])
    assert more == 36  # sd 2.12 points: ((1.96 + .84) x 2.12)^2 = 35.3 pairs by the normal distribution, 38 by t; 2 are there


def test_a_difference_that_the_seeds_show_is_stated(tmp_path: Path):
    (text,) = sentences(pair(tmp_path, [-0.020, -0.021, -0.022]))
    assert "-2.10 points top-1 (95 % -2.35 to -1.85, 3 seeds); at equal top-1 (83." in text
    assert "distinguishable" not in text
    assert (
        "sparse needs 1.45 x fewer multiply-adds (95 % 1.43 to 1.47) and sparse needs 2.04 x less time (95 % 2.02 to 2.06)."
        in text
    )


def test_equal_within_a_point(tmp_path: Path):
    (text,) = sentences(pair(tmp_path, [0.001, -0.001, 0.0005]))
    assert "is not distinguishable from zero, and is less than 1 point; at equal top-1" in text


def test_what_costs_more_names_the_other(tmp_path: Path):
    """Sparse at half the rate of dense: dense needs less time, sparse fewer multiply-adds."""
    (text,) = sentences(pair(tmp_path, [0.0, 0.0, 0.0], rate=50.0))
    assert (
        "sparse needs 1.60 x fewer multiply-adds (95 % 1.60 to 1.60) and dense needs 1." in text
        and " x less time (95 % 1." in text
    )


def test_one_seed_no_common_seed_and_an_unfinished_run_conclude_nothing(tmp_path: Path):
    (text,) = sentences(pair(tmp_path / "one", [0.05]))
    assert "+5.00 points top-1 with one seed: no interval, so it may be chance; train at least 3 seeds of both" in text
    cut = tmp_path / "one" / "sparse-s0" / "journal.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    found = compare([tmp_path / "one" / "dense-s0", cut.parent])
    assert sentences(found) == [
        "sparse-s0 (not finished) against dense-s0: not compared, sparse-s0 is not finished (running at epoch 4 of 4)."
    ]
    assert sentences(compare([tmp_path / "one" / "dense-s0"])) == []


def test_the_settings_that_differ_are_listed_and_the_sentence_is_on_top(tmp_path: Path):
    found = pair(tmp_path, [0.0, 0.0], optim={"lr": 2e-3, "name": "adamw"}, checkpoint={"keep": 9})
    assert differing(found) == [("optim.lr", ["0.001", "0.002"]), ("tokens.keep", ["1.0", "0.5"])]
    (text,) = sentences(found)
    assert page(found).index(text[:40]) < page(found).index("<h2>Table") < page(found).index("Settings that differ")
    assert markdown(found).startswith(text[:40]) and "| optim.lr | 0.001 | 0.002 |" in markdown(found)
    same = compare([tmp_path / "dense-s0", tmp_path / "dense-s1"])
    assert differing(same) == [] and "Settings that differ" not in page(same)


@pytest.mark.parametrize("off", [[0.0], [0.0, 0.5]])
def test_sentences_have_no_nan(tmp_path: Path, off: list[float]):
    assert "nan" not in sentences(pair(tmp_path, off))[0]
