"""What a comparison answers, in sentences: which group needs less for the same accuracy, whether the seeds suffice to tell, and which
settings differ."""

from __future__ import annotations

import math
from typing import Any

from trainer.analysis.comparison.comparability import IGNORED_SETTINGS
from trainer.analysis.comparison.groups import Comparison, Difference, Group
from trainer.analysis.comparison.statistics import MeanInterval, seeds_for
from trainer.analysis.history import History
from trainer.config.run_config import flat

SAME = 0.005  # of a ratio: 1.00 with two digits
POINT = 0.01  # the difference in top-1 for which seeds are counted
SECTIONS = ("tracking.", "checkpoint.", "trace.", "runs")  # settings that change neither results nor times noticeably


def sentences(comparison: Comparison) -> list[str]:
    """One per group beside the base; for a base alone none."""
    return [_sentence(group, comparison.base) for group in comparison.groups if group.against is not None]


def differing(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The settings that differ between the groups: [(key, value of each group, "" where it has no such key)]."""
    found = [_settings(group.runs[0]) for group in comparison.groups]
    keys = dict.fromkeys(key for settings in found for key in settings)
    rows = [(key, [_text(settings.get(key)) for settings in found]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _sentence(group: Group, base: Group) -> str:
    difference = group.against
    assert difference is not None
    if not (group.finished and base.finished):
        run = next(run for one in (group, base) for run in one.runs if not run.finished)
        return f"{group.name} against {base.name}: not compared, {run.name} is not finished ({_where(run)})."
    return f"{group.name} against {base.name}: {_accuracy(difference)}; {_cost(group, base, difference)}."


def _where(run: History) -> str:
    of = f" of {epochs}" if (epochs := run.config.get("epochs")) else ""
    return f"{run.status} at epoch {run.last.progress:.3g}{of}"


def _accuracy(difference: Difference) -> str:
    top1 = difference.top1
    mean = f"{100 * top1.mean:+.2f} points top-1"
    if not difference.paired:
        return f"{mean}, without a common seed: no interval, so it may be chance"
    if top1.count < 2:
        return f"{mean} with one seed: no interval, so it may be chance; train at least 3 seeds of both"
    if math.isnan(top1.low):
        return f"{mean} in each of {top1.count} seeds, which coincide: no interval; train more seeds of both"
    interval = f"{mean} (95 % {100 * top1.low:+.2f} to {100 * top1.high:+.2f}, {top1.count} seeds)"
    if top1.low > 0 or top1.high < 0:
        return interval
    text = f"{interval} is not distinguishable from zero"
    if top1.low > -POINT and top1.high < POINT:
        return f"{text}, and is less than 1 point"
    more = _more_seeds(top1)
    if more is None:
        return f"{text}, and the seeds differ too much to show 1 point with any feasible number of them"
    return f"{text}; {more} more {'seed' if more == 1 else 'seeds'} would show 1 point in 4 of 5 cases" if more else text


def _more_seeds(top1: MeanInterval) -> int | None:
    """Seeds to add until a difference of 1 point would be found, if the seeds go on to differ as much; None: too many."""
    need = seeds_for(POINT, top1.sd)
    return None if need is None else max(0, need - top1.count)


def _cost(group: Group, base: Group, difference: Difference) -> str:
    """Which needs less up to the score that both reached, in multiply-adds and in time."""
    parts = [_ratio(cost, difference.equal[cost], group.name, base.name) for cost in ("multiply-adds", "time")]
    return f"at equal top-1 ({100 * difference.at.mean:.2f} %) {' and '.join(parts)}"


def _ratio(cost: str, ratio: MeanInterval, ours: str, base: str) -> str:
    """ratio: base / ours."""
    if math.isnan(ratio.mean):
        return f"{cost} are unknown" if cost.endswith("s") else f"{cost} is unknown"
    few = "fewer" if cost.endswith("s") else "less"
    if max(abs(value - 1) for value in (ratio.mean, ratio.low, ratio.high) if not math.isnan(value)) < SAME:
        return f"both need as {'many' if cost.endswith('s') else 'much'} {cost}"
    if ratio.low <= 1 <= ratio.high:
        return f"it is open which needs {few} {cost} (x {ratio.mean:.2f}, 95 % {ratio.low:.2f} to {ratio.high:.2f})"
    cheaper = ratio.mean >= 1
    mean, *ends = (value if cheaper else 1 / value for value in (ratio.mean, ratio.low, ratio.high))
    bounds = "no interval" if math.isnan(ratio.low) else f"95 % {min(ends):.2f} to {max(ends):.2f}"
    return f"{ours if cheaper else base} needs {mean:.2f} x {few} {cost} ({bounds})"


def _settings(run: History) -> dict[str, Any]:
    return {
        key: value for key, value in flat(run.config).items() if key not in IGNORED_SETTINGS and not key.startswith(SECTIONS)
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
