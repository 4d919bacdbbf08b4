"""One handler per command of `trilevel`. Each imports what it needs when it runs, so `--help` stays fast."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cli import bench
from trainer.cli.output import configuration, show, show_table, write_json
from trainer.config.errors import ConfigError

STOPPED = 75  # EX_TEMPFAIL: preempted after saving a checkpoint; run the same command again with --resume


def _train(a: argparse.Namespace) -> int:
    config = configuration(a)
    if a.check:
        from trainer.preflight.check import check

        checked = check(config, int(os.environ.get("TRILEVEL_WORLD") or os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            show_table(checked.table())
            show(checked.text())
        return 0
    from trainer.train import train

    ended = train(config, resume=a.resume)
    code = STOPPED if ended.status == "preempted" else 0
    if exit_file := os.environ.get("TRILEVEL_EXIT_FILE"):  # read by `launch`: torchrun treats any other exit code as a crash
        try:
            if os.environ.get("RANK", "0") == "0":
                Path(exit_file).write_text(str(code))
        except OSError:  # a full disk; a launcher of one process still gets the code itself
            return code
        return 0
    return code


def _config(a: argparse.Namespace) -> None:
    from trainer.config import reference

    if a.markdown and a.key is not None:
        raise ConfigError(f"config {a.key} --markdown: the page has all keys; leave {a.key} out, or --markdown")
    if a.markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.text(reference.all_keys() if a.key is None else reference.select(a.key)))


def _pack(a: argparse.Namespace) -> None:
    from trainer.data.shards.pack import pack

    pack(
        a.source, a.destination, labels=a.labels, layout=a.layout, name=a.name, seed=a.seed, shard_size=int(a.shard_size * 2**20),
        workers=a.workers, short_side=a.short_side, quality=a.quality, show=show,
    )  # fmt: skip


def _init(a: argparse.Namespace) -> None:
    from trainer.preflight.first_config import write_configs

    found, (path, dense) = write_configs(a.folder, a.out, a.epochs)
    show(found.text())
    show(f"{path}: with the levels; {dense}: the dense control. Next: trilevel train {path} --check")


def _index(a: argparse.Namespace) -> None:
    from trainer.data.loader.dataset import counts_from_one, renumber
    from trainer.data.loader.shuffle_quality import runs_of_class
    from trainer.data.remote.cache import cache_at
    from trainer.data.shards.index import build_index

    cache = cache_at(a.cache, a.cache_size)
    index = build_index(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache)
    if index.is_files():
        show(f"{a.shards}: {len(index)} image files, {len(index.classes)} classes; index: {index.path}")
        return
    show(f"{a.shards}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards; index: {index.path}")
    if counts_from_one(index):
        show(f"warning: {renumber(index)}")
    share, chance = runs_of_class(index)
    if share > 0.5 and share > 2 * chance:
        show(
            f"warning: shards are sorted by class: {share:.0%} of neighbours share a label ({chance:.1%} if shuffled); "
            "`trilevel train CONFIG --check` measures how well a run's order mixes them, `trilevel pack` shuffles"
        )


def _verify(a: argparse.Namespace) -> int:
    from trainer.data.remote.cache import cache_at
    from trainer.data.remote.url import scheme
    from trainer.preflight.verify_shards import verify

    cache = cache_at(a.cache, a.cache_size) if scheme(a.shards) or a.cache else None
    broken = verify(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache)
    for example in broken:
        show(f"{example.id}\t{example.where}\t{example.reason}")
    show(f"{a.shards}: {len(broken)} broken image(s)")
    write_json(a.json, [example._asdict() for example in broken])
    return int(bool(broken))


def _eval(a: argparse.Namespace) -> None:
    from trainer.analysis.densities import score

    config, densities = _own_or_given(a), _densities(a.densities, "--densities") if a.densities else None
    found = score(a.model, config, densities, a.overrides, adaptive=a.adaptive, random=a.random)
    show_table(found.table())
    write_json(a.json, found.facts())
    if a.teacher:
        from trainer.analysis.teacher_agreement import agreement

        found_rank = agreement(a.model, a.teacher, config, a.overrides)
        show(f"rank correlation (Spearman) of the importance of tokens with the attention of {a.teacher}: {found_rank:.3f}")
    if a.plots:
        from trainer.analysis.density_plots import write

        for path in write(found, Path(a.plots)):
            show(str(path))


def _calibrate(a: argparse.Namespace) -> None:
    from trainer.analysis.calibrate import calibrate

    if a.images < 1:
        raise ConfigError(f"--images {a.images}: must be >= 1")
    found = calibrate(a.model, _own_or_given(a), _densities(a.density, "--density"), a.images, a.overrides)
    show_table(found.table())
    write_json(a.json, found.facts())


def _own_or_given(a: argparse.Namespace) -> Any:
    """The CONFIG of the command line, None for the run's own; `eval RUN key=value` changes that."""
    if a.config and "=" in a.config:
        a.config, a.overrides = None, [a.config, *a.overrides]
    return configuration(a) if a.config else None


def _densities(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < density <= 1 for density in found):
        raise ConfigError(f"{option} {text}: must be keep ratios in (0, 1], separated by commas, e.g. 1.0,0.7,0.5")
    return found


def _parity(a: argparse.Namespace) -> int:
    from trainer.preflight.parity import parity

    certificate = parity(configuration(a), steps=a.steps, progress=True)
    show(certificate)
    if a.json:
        certificate.write(Path(a.json))
    return 0 if certificate.equal else 1


def _replay(a: argparse.Namespace) -> None:
    from trainer.provenance.recorded_run import RecordedRun
    from trainer.provenance.replay import replay, write

    replayed = replay(RecordedRun(a.run_directory, a.overrides), a.step)
    show_table(replayed.table())
    show(replayed.text())
    for path in write(replayed, Path(a.out or f"{a.run_directory}/replay/step-{a.step:08d}")):
        show(path)


def _audit(a: argparse.Namespace) -> int:
    from trainer.provenance.audit import audit
    from trainer.provenance.recorded_run import RecordedRun

    found = audit(RecordedRun(a.run_directory, a.overrides))
    show_table(found.table())
    show(found.text())
    write_json(a.json, found.facts())
    return 0 if found.equal else 1


def _show(a: argparse.Namespace) -> None:
    from trainer.analysis import kept_tokens

    out = Path(a.out or f"{a.run_directory}/show")
    if a.weights:
        from trainer.analysis import kept_weights

        if a.images or a.overrides or a.token is not None:
            raise ConfigError("show --weights: draws the weights of a run, no images; leave images, settings and --token out")
        return show(kept_weights.show(a.run_directory, out))
    words = [*a.images, *a.overrides]  # overrides: words that followed an option
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    images = [word for word in words if word not in settings]
    for path in kept_tokens.show(a.run_directory, images, out, a.token, settings):
        show(path)


def _kept(a: argparse.Namespace) -> None:
    from trainer.provenance.kept_table import kept_of, write
    from trainer.provenance.recorded_run import RecordedRun

    run = RecordedRun(a.run_directory, a.overrides)
    kept = kept_of(run, a.epoch)
    show_table(kept.table())
    for path in write(kept, run, Path(a.out or f"{a.run_directory}/kept/lists")):
        show(path)
    write_json(a.json, kept.facts())


def _plan(a: argparse.Namespace) -> None:
    from trainer.preflight import fault_simulation as faults
    from trainer.preflight.estimate import estimate, read

    if not a.mtbf and (a.start_seconds is not None or a.save_seconds is not None):
        raise ConfigError("--start-seconds, --save-seconds: only with --mtbf, e.g. --mtbf 3h")
    config, mtbf = configuration(a), [faults.parse_mtbf(text) for text in a.mtbf]
    found = estimate(config, read(a.measured), a.nodes, a.processes, a.bandwidth, a.cores)
    facts = found.facts()
    show_table(found.table())
    show(found.text())
    if mtbf:
        costs = faults.measured_costs(filter(os.path.isdir, a.measured), a.start_seconds, a.save_seconds)
        under = faults.forecast(
            found.hours, found.steps, config.epochs, config.checkpoint.every, config.engine.timeout, mtbf, costs
        )
        show_table(under.table())
        show(under.text())
        facts["faults"] = under.facts()
    write_json(a.json, facts)


def _export(a: argparse.Namespace) -> None:
    if Path(a.out).suffix == ".onnx":
        from trainer.checkpoint.export_onnx import export_onnx

        if a.density is None:
            raise ConfigError(
                f"export {a.out}: an ONNX file has one density; add --density, e.g. --density .5, or 1 for all tokens"
            )
        densities = _densities(a.density, "--density")
        if len(densities) > 1:
            raise ConfigError(f"--density {a.density}: an ONNX file has one density; write one file for each")
        show(export_onnx(a.run_directory, a.out, densities[0], a.checkpoint, a.ema, a.form).text())
        return
    if a.density is not None:
        raise ConfigError(f"--density {a.density}: only for an ONNX file; a safetensors file answers at any density")
    from trainer.checkpoint.export import export

    show(export(a.run_directory, a.out, a.checkpoint, a.ema, a.form).text())


def _sync(a: argparse.Namespace) -> int:
    from trainer.tracking.sync import sync

    done = sync(Path(a.run_directory))
    show(done.message)
    return 0 if done.done else 1


def _report(a: argparse.Namespace) -> None:
    from trainer.analysis.report import summary, where_to_look
    from trainer.analysis.report_plot import picture

    show_table(summary(a.run_directory).table)
    show(f"plot: {picture(a.run_directory)}")
    show(where_to_look(a.run_directory))


def _compare(a: argparse.Namespace) -> None:
    from trainer.analysis import compare_page
    from trainer.analysis.compare import compare, from_mlflow
    from trainer.analysis.compare_verdict import sentences

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


def _compare_study(a: argparse.Namespace) -> None:
    from trainer.analysis import study_page

    if wrong := next((name for name in ("runs", "experiment", "base") if getattr(a, name)), None):
        raise ConfigError(f"compare --study with {wrong}: the page is made from kept journals alone; leave {wrong} out")
    for path in study_page.write(a.study, Path(a.journals), Path(a.out or f"{a.journals}.md")):
        show(path)


def _doctor(a: argparse.Namespace) -> int:
    from trainer.preflight.doctor import main as doctor

    return doctor(a.hosts, a.ssh_config)


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "train": _train,
    "config": _config,
    "pack": _pack,
    "init": _init,
    "index": _index,
    "verify": _verify,
    "eval": _eval,
    "calibrate": _calibrate,
    "parity": _parity,
    "replay": _replay,
    "audit": _audit,
    "show": _show,
    "kept": _kept,
    "plan": _plan,
    "export": _export,
    "report": _report,
    "sync": _sync,
    "compare": _compare,
    "doctor": _doctor,
    **{f"bench {part}": bench.bench for part in bench.PARTS},
}
