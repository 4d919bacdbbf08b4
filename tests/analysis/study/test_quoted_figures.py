"""Every difference with an interval that a page quotes is one of the studies', rounded as it is quoted: pages do not go stale."""

from __future__ import annotations

import functools
import re

import pytest

from tests.conftest import ROOT
from trainer.analysis.comparison.groups import final
from trainer.analysis.comparison.statistics import MeanInterval
from trainer.analysis.study import file as study_file
from trainer.analysis.study.results import StudyResult, result

NUMBER = r"[+-]?\d*\.\d+"
QUOTED = re.compile(rf"({NUMBER})(?: points)? \((?:95 % )?({NUMBER}) to ({NUMBER})(?=[,;:)])")
PAGES = (
    "README.md",
    "docs/results/reproduced.md",
    "docs/results/quickstart.md",
    "docs/results/weights.md",
    "docs/results/sait.md",
)


@functools.cache
def studies() -> tuple[StudyResult, ...]:
    files = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return tuple(result(study_file.read(path), ROOT / "docs" / "results" / "study") for path in files)


def known() -> list[MeanInterval]:
    asked = [question for study in studies() for question in study.questions]
    return [one for q in asked for one in (q.test.difference, q.worst_class, q.equal_multiply_adds, q.equal_time)]


def same(quoted: tuple[str, ...], found: MeanInterval) -> bool:
    """Either order of the two arms: a loss of 3.2 points (2.1 to 4.3) is a difference of -3.2 (-4.3 to -2.1)."""
    shown = [float(text) for text in quoted]
    half = [0.5 * 10.0 ** -len(text.split(".")[1]) + 1e-9 for text in quoted]
    mean, low, high = (100 * value for value in (found.mean, found.low, found.high))
    both = ((mean, low, high), (-mean, -high, -low))
    return any(all(abs(a - b) <= error for a, b, error in zip(shown, one, half, strict=True)) for one in both)


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_difference_is_one_of_a_study(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    found = [match.groups() for match in QUOTED.finditer(text)]
    unknown = [quoted for quoted in found if not any(same(quoted, one) for one in known())]
    assert found and not unknown, unknown


MEAN = re.compile(r"(\d+\.\d) (?:±|\+-) (\d+\.\d) %")


@pytest.mark.parametrize("page", ["README.md", "docs/results/quickstart.md", "configs/quickstart.yaml", "configs/cifar10.yaml"])
def test_every_quoted_mean_is_one_of_a_study(page: str) -> None:
    arms = {(f"{100 * arm.top1.mean:.1f}", f"{100 * arm.top1.sd:.1f}") for study in studies() for arm in study.arms}
    found = {match.groups() for match in MEAN.finditer((ROOT / page).read_text())}
    assert found and found <= arms, found - arms


def test_every_seed_of_the_quickstart_reaches_what_its_file_names() -> None:
    levels = next(study for study in studies() if study.file.name == "levels")
    reached = [final(run) for arm in levels.arms if arm.name == "tri_level" for run in arm.runs.values()]
    lowest, highest = re.search(r"\((\d+\.\d) to (\d+\.\d)\)", (ROOT / "configs" / "quickstart.yaml").read_text()).groups()
    assert len(reached) >= 5 and (f"{100 * min(reached):.1f}", f"{100 * max(reached):.1f}") == (lowest, highest)
