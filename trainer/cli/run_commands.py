"""Handlers of the commands that read a run's directory: replay, audit, show, kept, report, sync, compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.cli.output import show, show_table, write_json
from trainer.config.errors import ConfigError


def replay(a: argparse.Namespace) -> None:
    from trainer.provenance.recorded_run import RecordedRun
    from trainer.provenance.replay import replay, write

    replayed = replay(RecordedRun(a.run_directory, a.overrides), a.step)
    show_table(replayed.table())
    show(replayed.text())
    for path in write(replayed, Path(a.out or f"{a.run_directory}/replay/step-{a.step:08d}")):
        show(path)


def audit(a: argparse.Namespace) -> int:
    from trainer.provenance.audit import audit
    from trainer.provenance.recorded_run import RecordedRun

    found = audit(RecordedRun(a.run_directory, a.overrides))
    show_table(found.table())
    show(found.text())
    write_json(a.json, found.facts())
    return 0 if found.equal else 1


def show_run(a: argparse.Namespace) -> None:
    from trainer.analysis.pictures import kept_tokens

    out = Path(a.out or f"{a.run_directory}/show")
    if a.weights:
        from trainer.analysis.pictures import kept_weights

        if a.images or a.overrides or a.token is not None:
            raise ConfigError("show --weights: draws the weights of a run, no images; leave images, settings and --token out")
        return show(kept_weights.show(a.run_directory, out))
    words = [*a.images, *a.overrides]  # overrides: words that followed an option
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    images = [word for word in words if word not in settings]
    for path in kept_tokens.show(a.run_directory, images, out, a.token, settings):
        show(path)


def kept(a: argparse.Namespace) -> None:
    from trainer.provenance.kept_table import kept_of, write
    from trainer.provenance.recorded_run import RecordedRun

    run = RecordedRun(a.run_directory, a.overrides)
    kept = kept_of(run, a.epoch)
    show_table(kept.table())
    for path in write(kept, run, Path(a.out or f"{a.run_directory}/kept/lists")):
        show(path)
    write_json(a.json, kept.facts())


def report(a: argparse.Namespace) -> None:
    from trainer.analysis.mlflow_pages import page_of_run
    from trainer.analysis.report.picture import picture
    from trainer.analysis.report.summary import summary

    show_table(summary(a.run_directory).table)
    try:
        show(f"plot: {picture(a.run_directory)}")
    except OSError as error:  # somebody else's run, or an archive
        print(f"no plot: {error.filename}: {error.strerror}", file=sys.stderr)
    show(page_of_run(a.run_directory))


def sync(a: argparse.Namespace) -> int:
    from trainer.tracking.sync import sync

    done = sync(Path(a.run_directory))
    show(done.message)
    return 0 if done.done else 1


def compare(a: argparse.Namespace) -> None:
    from trainer.analysis.comparison import page as compare_page
    from trainer.analysis.comparison.figures import facts
    from trainer.analysis.comparison.groups import compare, from_mlflow
    from trainer.analysis.comparison.verdict import sentences
    from trainer.analysis.mlflow_pages import page_of_comparison

    if a.study:
        return _compare_study(a)
    out = Path(a.out or "compared")
    if not a.runs and not a.experiment:
        raise ConfigError("compare: no runs given; name run directories, or an MLflow experiment with --experiment NAME")
    theirs, missing = from_mlflow(a.experiment, out / "runs", a.uri) if a.experiment else ([], [])
    found = compare([*map(Path, a.runs), *theirs], base=a.base, missing=missing)
    for text in sentences(found):
        show(text)
    show_table(compare_page.table(found))
    for text in compare_page.warnings(found):
        show(f"warning: {text}")
    for path in compare_page.write(found, out):
        show(path)
    if link := page_of_comparison([run.directory for group in found.groups for run in group.runs]):
        show(f"in MLflow: {link}")
    write_json(a.json, facts(found))


def _compare_study(a: argparse.Namespace) -> None:
    from trainer.analysis.study import page as study_page

    if wrong := next((name for name in ("runs", "experiment", "base", "json") if getattr(a, name)), None):
        raise ConfigError(f"compare --study with {wrong}: the page is made from kept journals alone; leave {wrong} out")
    for path in study_page.write(a.study, Path(a.journals), Path(a.out) if a.out else None):
        show(path)
