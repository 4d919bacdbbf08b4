"""The Markdown page of studies: tables, a sentence per question, and where, when and from which code the runs come.

Made from kept journals alone, so the same journals give the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from trainer.analysis.comparison.statistics import FEWEST_PAIRS, LEVEL, MeanInterval, seeds_for
from trainer.analysis.study.file import read
from trainer.analysis.study.results import Arm, Question, StudyResult, result
from trainer.analysis.units import duration
from trainer.config.errors import ConfigError
from trainer.storage.text import markdown_text, printable

HEAD = """# Studies

Made from the journals of finished runs in `{journals}` by
```
{command}
```
Top-1 is that of the last evaluation, in % of the validation images; differences are in points, paired by seed (arm minus reference), with
95 % intervals of Student's t from three pairs on. p: paired t-test, two-sided; Holm: corrected over all questions of the study's file,
also those without an answer yet; *later*: asked after results were known, so its p is not corrected and only suggests. ±: standard
deviation over the seeds. Worst class: difference of the accuracies of the worst classes, not tested. *At equal multiply-adds*:
the same difference where both runs have used as much as the smaller total of the two, read from their curves: there the run with the
longer schedule is cut off before its learning rate has fallen, a disadvantage that an arm with fewer epochs does not have. Multiply-adds
count forward passes, those of probed images too, which take a third of the time because no backward pass follows. *Time* is calculated from
step times measured with nothing beside, because the runs shared their machine, or is that of the runs (`quiet: true`); *at equal time* is
read from the curves too. A result holds for the data set, network and number of epochs of its study. Pictures of the tokens that are kept
and of the images forgotten most: [pictures.md](pictures.md).
"""
ARMS = (
    "arm",
    "seeds",
    "top-1 (%)",
    "worst class (%)",
    "weights (bytes)",
    "weights",
    "kept per class",
    "images shown",
    "multiply-adds",
    "time",
)
QUESTIONS = (
    "arm",
    "reference",
    "pairs",
    "difference",
    "p",
    "Holm",
    "worst class",
    "at equal multiply-adds",
    "at equal time",
)


def write(files: Sequence[str], journals: Path, out: Path | None = None) -> list[Path]:
    """The page at `out` (default: JOURNALS.md, which is not replaced where it has other studies) and a picture per study beside it, in a
    folder of the page's name. Raises ConfigError, also where no study has a kept journal, and JournalError."""
    from trainer.analysis.study.picture import picture

    found = [result(read(file), journals) for file in files]
    if not any(one.arms for one in found):
        raise ConfigError(
            f"compare --study: no kept journals of {', '.join(one.file.name for one in found)} in {journals}; name their folder with "
            f"--journals DIR, or train the study: python -m launch study {files[0]}"
        )
    if out is None:
        out = Path(f"{journals}.md")
        _refuse_to_replace(out, [one.file.name for one in found])
    pictures = {one.file.name: out.with_suffix("") / f"{one.file.name}.png" for one in found if one.arms}
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"trilevel compare --study {' '.join(files)} --journals {journals} --out {out}"
    shown = {name: f"{out.stem}/{path.name}" for name, path in pictures.items()}
    out.write_text(printable(page(found, journals, command, shown)))
    for one in found:
        if one.arms:
            picture(one, pictures[one.file.name])
    return [out, *pictures.values()]


def _refuse_to_replace(out: Path, names: list[str]) -> None:
    there = re.findall(r"^## (\w[\w.]*)$", out.read_text(), re.M) if out.is_file() else []
    if others := [name for name in there if name not in names]:
        raise ConfigError(
            f"compare --study: {out} has other studies too ({', '.join(others)}), which would be lost; name another page with --out "
            f"{names[0]}.md, or all its studies"
        )


def page(found: Sequence[StudyResult], journals: Path, command: str, pictures: dict[str, str]) -> str:
    """The text. pictures: {study: path of its picture from the page}."""
    parts = [HEAD.format(journals=journals, command=command), *(_study(one, pictures.get(one.file.name)) for one in found)]
    return "\n".join(parts)


def sentence(question: Question) -> str:
    """One question in plain words."""
    arm, other, test = question.arm, question.reference, question.test
    off = test.difference
    if off.count == 0:
        return f"{arm} and {other}: not measured."
    if off.count < FEWEST_PAIRS:
        pairs = "one pair" if off.count == 1 else f"{off.count} pairs"
        return f"{arm} and {other}: {pairs}, {_points(off.mean)} points; no interval, no conclusion."
    if math.isnan(off.low):
        return f"{arm} and {other}: {off.count} pairs with the same difference, {_points(off.mean)} points; no interval, no conclusion."
    interval = f"95 % {_points(off.low)} to {_points(off.high)}, n = {off.count}"
    if question.later:
        verdict = "" if test.p < LEVEL else ", not distinguishable"
        return f"{arm} and {other}: {_points(off.mean)} points ({interval}, p {_p(test.p)}){verdict}; asked after results were known."
    side = f"{arm} is {abs(100 * off.mean):.1f} points {'above' if off.mean > 0 else 'below'} {other}"
    if test.holm < LEVEL:
        return f"{side} ({interval}, Holm p {_p(test.holm)})."
    if test.p < LEVEL:
        return f"{side} by its own test ({interval}, p {_p(test.p)}), not after Holm's correction ({_p(test.holm)}): open."
    text = f"{arm} and {other} are not distinguishable: {_points(off.mean)} points ({interval}, Holm p {_p(test.holm)})"
    if off.low > -0.01 and off.high < 0.01:
        return f"{text}; the interval excludes differences of 1 point."
    need = seeds_for(0.01, off.sd)
    if need is None:
        return f"{text}; too much spread to find 1 point with any feasible number of seeds."
    more = need - off.count
    if more < 1:
        return f"{text}."
    return (
        f"{text}; to find a difference of 1 point (power .8, uncorrected) takes {more} more {'seed' if more == 1 else 'seeds'}."
    )


def _study(found: StudyResult, picture: str | None) -> str:
    file = found.file
    lines = [f"## {file.name}", markdown_text(file.question), "", f"Study: `{file.path.as_posix()}`, recipe `{file.config}`."]
    if not found.arms:
        return "\n".join([*lines, "", "Not measured: no kept journal.", ""])
    missing = [name for name in file.arms if name not in [arm.name for arm in found.arms]]
    lines += ["", *_origin(found), "", *_table(ARMS, [_arm(arm, found.timed) for arm in found.arms])]
    lines += ["", _relative(found)]
    if not all(math.isnan(arm.stored) for arm in found.arms):
        lines += [
            "",
            "Weights: all parameters of the network in float32, of pruned layers the groups that are left with their indices; then "
            f"relative to {file.reference}.",
        ]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    measured = [question for question in found.questions if question.test.difference.count]
    if measured:
        tested = sum(not math.isnan(question.test.p) for question in measured)
        lines += [
            "",
            f"Questions: {len(file.questions)}, over which Holm corrects"
            + (f", and {len(file.later)} later ones" if file.later else "")
            + f"; {tested} of them have three pairs or more.",
        ]
        lines += ["", *_table(QUESTIONS, [_question(question, found.timed) for question in measured])]
    if picture:
        lines += ["", f"![top-1 by multiply-adds{' and by time' if found.timed else ''}: {file.name}]({picture})"]
    lines += ["", *(f"- {markdown_text(sentence(question))}" for question in measured)]
    if found.notes:
        lines += ["", "Notes:", *(f"- {markdown_text(note)}" for note in found.notes)]
    return "\n".join([*lines, ""])


def _origin(found: StudyResult) -> list[str]:
    """Hardware, dates and commits of the runs."""
    runs = [run for arm in found.arms if arm.name not in found.file.views for run in arm.runs.values()]
    starts = [start for run in runs for start in run.starts]
    devices = sorted({f"{start.get('world', 1)} x {start.get('device') or 'unknown device'}" for start in starts})
    torch = sorted({str((start.get("versions") or {}).get("torch", "unknown")) for start in starts})
    days = sorted({datetime.fromtimestamp(start["time"], UTC).date().isoformat() for start in starts})
    commits = sorted({str(start.get("commit") or "unknown")[:7] for start in starts})
    between = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    data = (runs[0].start.get("data") or {}) if runs else {}
    sizes = ", ".join(f"{(data.get(split) or {}).get('images', 'unknown')} {split}" for split in ("train", "validation"))
    return [
        f"{len(runs)} runs on {', '.join(devices)}; torch {', '.join(torch)}; started {between}; "
        f"commit {', '.join(commits)}; images: {sizes}."
    ]


def _relative(found: StudyResult) -> str:
    """What multiply-adds and times refer to, and where the times come from."""
    reference, of = found.file.reference, found.times.measured if found.times else {}
    if found.times:
        return (
            f"Multiply-adds and time relative to {reference}, paired by seed. Time: forward, backward and optimizer step, without loader, "
            "evaluation and bookkeeping; the steps of each run x the step times of `trilevel bench study`, a probed image as a third of "
            f"its multiply-adds ({of['device']}, {of['threads']} {'thread' if of['threads'] == 1 else 'threads'}, {of['precision']}, "
            f"torch {of['torch']}, {of['date']}, commit {of['commit'][:7]}, {of['rounds']} rounds)."
        )
    if not found.file.quiet:
        return f"Multiply-adds relative to {reference}."
    base = next((arm for arm in found.arms if arm.name == reference), None)
    own = f" {base.name} trains for {duration(fmean(run.last.trained for run in base.runs.values()))} per run." if base else ""
    return f"Multiply-adds and time relative to {reference}, paired by seed.{own}"


def _arm(arm: Arm, timed: bool) -> list[str]:
    kept = "" if arm.class_kept is None or arm.class_kept[0] == 1 else f"{arm.class_kept[0]:.2f} to {arm.class_kept[1]:.2f}"
    worst = _spread(arm.worst_class) or "not recorded"
    return [
        arm.name, ", ".join(map(str, arm.runs)), _spread(arm.top1), worst,
        "" if math.isnan(arm.stored) else f"{arm.stored:,.0f}", "" if math.isnan(arm.stored_share) else f"{arm.stored_share:.3f}",
        kept, f"{arm.images:,.0f}", _share(arm.multiply_adds),
        _share(arm.time) if timed else "",
    ]  # fmt: skip


def _question(question: Question, timed: bool) -> list[str]:
    test = question.test
    return [
        question.arm, question.reference, str(test.difference.count), _difference(test.difference), _p(test.p),
        "later" if question.later else _p(test.holm),
        _difference(question.worst_class), _difference(question.equal_multiply_adds), _difference(question.equal_time) if timed else "",
    ]  # fmt: skip


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in which every cell is empty are left out."""
    used = [i for i in range(len(names)) if any(row[i] for row in rows)]
    head = [" | ".join(names[i] for i in used), "---".join(["", *["|"] * (len(used) - 1), ""])]
    return [f"| {head[0]} |", f"|{head[1]}|", *(f"| {' | '.join(markdown_text(row[i]) for i in used)} |" for row in rows)]


def _spread(found: MeanInterval) -> str:
    if math.isnan(found.mean):
        return ""
    return f"{100 * found.mean:.2f}" + ("" if math.isnan(found.sd) else f" ± {100 * found.sd:.2f}")


def _difference(found: MeanInterval) -> str:
    if math.isnan(found.mean):
        return ""
    shown = f"{100 * found.mean:+.2f}"
    if math.isnan(found.low) or found.count < FEWEST_PAIRS:
        return shown
    return f"{shown} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _share(found: MeanInterval) -> str:
    return "" if math.isnan(found.mean) else f"{found.mean:.3f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
