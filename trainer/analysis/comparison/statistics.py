"""Means and paired differences over seeds: interval and p of Student's t, Holm's correction, seeds that a difference would need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEVEL = 0.05  # a corrected p below it counts
POWER = 0.8
MOST_SEEDS = 999
FEWEST_PAIRS = 3  # for an interval: of two, Student's t makes one of 12.7 times their half difference, or chance one of nothing
EQUAL = 1e-9  # standard deviation of differences that are the same but for rounding


@dataclass(frozen=True)
class MeanInterval:
    """A number over the runs of a group. sd: sample standard deviation; low, high: 95 % interval of the mean; nan for one run."""

    mean: float
    sd: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> MeanInterval:
        known = [value for value in values if not math.isnan(value)]
        if len(known) < 2:
            return cls(known[0] if known else math.nan, math.nan, math.nan, math.nan, len(known))
        from scipy.stats import t  # takes a second to import

        mean, sd = statistics.fmean(known), statistics.stdev(known)
        half = float(t.ppf(0.975, len(known) - 1)) * sd / math.sqrt(len(known))
        return cls(mean, sd, mean - half, mean + half, len(known))

    @classmethod
    def of_ratios(cls, values: list[float]) -> MeanInterval:
        """Of ratios: in logarithms, so that half and double are equally far from 1 and no bound is below 0."""
        spread = cls.of([math.log(value) for value in values])
        return cls(math.exp(spread.mean), math.nan, math.exp(spread.low), math.exp(spread.high), spread.count)

    def alone(self) -> MeanInterval:
        """Without the interval."""
        return replace(self, sd=math.nan, low=math.nan, high=math.nan)


@dataclass(frozen=True)
class PairedTest:
    """A paired, two-sided t-test of differences. p, holm (p corrected over the questions of a table) and the interval: nan for less than
    FEWEST_PAIRS.

    Pairs with one and the same difference have no interval and no p either: top-1 moves in steps of one image, so few pairs coincide by
    chance, and a t-test would take that for certainty.
    """

    difference: MeanInterval
    p: float
    holm: float = math.nan

    @classmethod
    def of(cls, differences: Sequence[float]) -> PairedTest:
        found = MeanInterval.of(list(differences))
        if found.count < FEWEST_PAIRS or found.sd < EQUAL:
            found = replace(found, low=math.nan, high=math.nan)
        return cls(found, _p(found))


def _p(found: MeanInterval) -> float:
    if found.count < FEWEST_PAIRS or found.sd < EQUAL:
        return math.nan
    from scipy.stats import t  # takes a second to import

    return float(2 * t.sf(abs(found.mean) / (found.sd / math.sqrt(found.count)), found.count - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected over all of them (Holm 1979, step-down). nan, a question without an answer yet, stays nan and counts as 1: so
    what is asked decides the correction, not what is finished.

    The k-th smallest of m is multiplied by m - k + 1, none is below a smaller one's, none above 1.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, highest = [math.nan] * len(ps), 0.0
    for k, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - k) * p))
        corrected[i] = highest
    return corrected


def seeds_for(difference: float, sd: float) -> int | None:
    """Pairs with which a paired t-test at the 5 % level finds a true `difference` in 4 of 5 studies; None above 999.

    sd: of the differences between pairs. Power by the noncentral t distribution.
    """
    from scipy.stats import nct, t

    if sd == 0:
        return 2
    for n in range(2, MOST_SEEDS + 1):
        edge, shift = float(t.ppf(1 - LEVEL / 2, n - 1)), difference / sd * math.sqrt(n)
        if float(nct.sf(edge, n - 1, shift)) >= POWER:  # the other side adds less than a hundredth of it
            return n
    return None
