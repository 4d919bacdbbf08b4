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


STUDIES_OF = {
    "sait": ("sait_digits", "sait_cifar10"),
    "weights": ("blocks_digits", "blocks_cifar10"),
    "pruning": ("blocks_digits", "blocks_cifar10"),
    "what it does": ("sait_digits", "sait_cifar10", "blocks_digits", "blocks_cifar10"),
}
ELSEWHERE = {("+.3", "-1.1", "+1.7")}  # tokens by importance and at random: from the evaluations of docs/results/sait.md


@functools.cache
def studies() -> tuple[StudyResult, ...]:
    files = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return tuple(result(study_file.read(path), ROOT / "docs" / "results" / "study") for path in files)


def known(about: str) -> list[MeanInterval]:
    """Of the studies that a page's section is about, by its heading."""
    names = next((names for word, names in STUDIES_OF.items() if word in about.lower()), ("levels", "cifar10"))
    asked = [question for study in studies() if study.file.name in names for question in study.questions]
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
    found, unknown = 0, []
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        about = "sait" if page.endswith("sait.md") else "weights" if page.endswith("weights.md") else section.splitlines()[0]
        quoted = [match.groups() for match in QUOTED.finditer(" ".join(section.split()))]
        found += len(quoted)
        unknown += [(about, one) for one in quoted if one not in ELSEWHERE and not any(same(one, of) for of in known(about))]
    assert found and not unknown, unknown


MEAN = re.compile(r"(\d+\.\d) (?:±|\+-) (\d+\.\d) %")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/results/quickstart.md",
        "configs/quickstart.yaml",
        "configs/quickstart_dense.yaml",
        "configs/cifar10.yaml",
    ],
)
def test_every_quoted_mean_is_one_of_a_study(page: str) -> None:
    arms = {(f"{100 * arm.top1.mean:.1f}", f"{100 * arm.top1.sd:.1f}") for study in studies() for arm in study.arms}
    found = {match.groups() for match in MEAN.finditer((ROOT / page).read_text())}
    assert found and found <= arms, found - arms


def test_every_seed_of_the_quickstart_reaches_what_its_file_names() -> None:
    levels = next(study for study in studies() if study.file.name == "levels")
    reached = [final(run) for arm in levels.arms if arm.name == "tri_level" for run in arm.runs.values()]
    lowest, highest = re.search(r"\((\d+\.\d) to (\d+\.\d)\)", (ROOT / "configs" / "quickstart.yaml").read_text()).groups()
    assert len(reached) >= 5 and (f"{100 * min(reached):.1f}", f"{100 * max(reached):.1f}") == (lowest, highest)
