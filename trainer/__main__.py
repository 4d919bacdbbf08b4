"""The command line: `trilevel COMMAND`, the same as `python -m trainer COMMAND`. Errors are one message and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import Config, ConfigError

STOPPED = 75  # EX_TEMPFAIL: preempted with a checkpoint, start the same command again with --resume


def main(words: list[str] | None = None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(
        words
    )  # overrides may stand behind an option, as in `train CONFIG --resume lr=...`
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"trilevel: {error}", file=sys.stderr)
        return 2


def _is_ours(error: Exception) -> bool:
    """Errors written for the user: no stack is shown for them. They all come from our own modules."""
    return type(error).__module__.split(".")[0] in ("trainer", "sparsity")


def _train(a: argparse.Namespace) -> int:
    config = _config(a)
    if a.check:
        from trainer.check import check

        checked = check(config, int(os.environ.get("TRILEVEL_WORLD") or os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            _print(checked.table())
            print(checked.text())
        return 0
    from trainer.train import train

    ended = train(config, resume=a.resume)
    code = STOPPED if ended.status == "preempted" else 0
    if told := os.environ.get("TRILEVEL_EXIT_FILE"):  # our launcher reads it there: torchrun takes any exit code for a crash
        if os.environ.get("RANK", "0") == "0":
            Path(told).write_text(str(code))
        return 0
    return code


def _pack(a: argparse.Namespace) -> None:
    from trainer.data.pack import pack

    for split, index in pack(
        a.source, a.destination, labels=a.labels, name=a.name, seed=a.seed, shard_size=int(a.shard_size * 2**20),
        workers=a.workers, short_side=a.short_side, quality=a.quality,
    ).items():  # fmt: skip
        print(f"{split}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards in {a.destination}")


def _index(a: argparse.Namespace) -> None:
    from trainer.data.cache import cache_at
    from trainer.data.index import build_index

    cache = cache_at(a.cache, a.cache_size)
    index = build_index(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache, allow_pipe=a.allow_pipe)
    print(f"{a.shards}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards; index: {index.path}")


def _verify(a: argparse.Namespace) -> int:
    from trainer.data.cache import cache_at
    from trainer.data.remote import scheme
    from trainer.data.verify import verify

    cache = cache_at(a.cache, a.cache_size) if scheme(a.shards) or a.cache else None
    broken = verify(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache, allow_pipe=a.allow_pipe)
    for example in broken:
        print(f"{example.id}\t{example.where}\t{example.reason}")
    print(f"{a.shards}: {len(broken)} broken image(s)")
    _json(a.json, [example._asdict() for example in broken])
    return int(bool(broken))


def _eval(a: argparse.Namespace) -> None:
    from trainer.score import score

    if a.config and "=" in a.config:  # `eval RUN key=value`: the run's own configuration, changed
        a.config, a.overrides = None, [a.config, *a.overrides]
    rows = score(a.model, _config(a) if a.config else None, _densities(a.densities), a.overrides)
    _print(rows.table())
    _json(a.json, rows.facts())


def _densities(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < density <= 1 for density in found):
        raise ConfigError(f"--densities {text}: write shares of tokens in (0, 1], with commas between: 1.0,0.7,0.5")
    return found


def _parity(a: argparse.Namespace) -> int:
    from trainer.parity import parity

    certificate = parity(_config(a), steps=a.steps)
    print(certificate)
    if a.json:
        certificate.write(Path(a.json))
    return 0 if certificate.equal else 1


def _replay(a: argparse.Namespace) -> None:
    from trainer.past import Past
    from trainer.replay import replay, write

    replayed = replay(Past(a.run_directory, a.overrides), a.step)
    _print(replayed.table())
    print(replayed.text())
    for path in write(replayed, Path(a.out or f"{a.run_directory}/replay/step-{a.step:08d}")):
        print(path)


def _audit(a: argparse.Namespace) -> int:
    from trainer.audit import audit
    from trainer.past import Past

    found = audit(Past(a.run_directory, a.overrides))
    _print(found.table())
    print(found.text())
    _json(a.json, found.facts())
    return 0 if found.equal else 1


def _bench_input(a: argparse.Namespace) -> None:
    if a.plan_only:
        from trainer.bench_plan import plan

        planned = plan(_config(a), a.examples, a.shards, a.world)
        _print(planned.table())
        _json(a.json, planned.rows())
        return
    from trainer.bench_input import bench

    rows = a.rows.split(",") if a.rows else None
    measured = bench(_config(a), images=a.images, workers=a.workers, batch=a.batch, passes=a.passes, only=rows)
    _print(measured.table())
    print(measured.text())
    _json(a.json, measured.rows)


def _show(a: argparse.Namespace) -> None:
    from trainer.show import show

    out = Path(a.out or f"{a.run_directory}/show")
    for path in show(a.run_directory, a.images, out, a.token):
        print(path)


def _bench_step(a: argparse.Namespace) -> None:
    from trainer.bench_step import bench
    from trainer.configfile import load

    measured = bench(_config(a), load(a.against) if a.against else None, a.pairs)
    _print(measured.table())
    print(measured.text())
    _json(a.json, measured.rows)


def _sync(a: argparse.Namespace) -> int:
    from trainer.tracking import sync

    done = sync(Path(a.run_directory))
    print(done.message)
    return 0 if done.done else 1


def _report(a: argparse.Namespace) -> None:
    from trainer.report import picture, summary, where_to_look

    _print(summary(a.run_directory).table)
    print(f"picture: {picture(a.run_directory)}")
    print(where_to_look(a.run_directory))


def _compare(a: argparse.Namespace) -> None:
    from trainer import compare_page
    from trainer.compare import compare, from_mlflow

    if not a.runs and not a.experiment:
        raise ConfigError("compare: name run directories, or an MLflow experiment with --experiment NAME")
    runs = [Path(run) for run in a.runs] or from_mlflow(a.experiment, Path(a.out) / "runs", a.uri)
    found = compare(runs, base=a.base)
    _print(compare_page.table(found))
    for path in compare_page.write(found, Path(a.out)):
        print(path)


def _doctor(a: argparse.Namespace) -> int:
    from trainer.doctor import main as doctor

    return doctor(a.hosts)


def _config(a: argparse.Namespace) -> Config:
    from trainer.configfile import load

    return load(a.config, a.overrides)


def _print(table: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(table)


def _json(path: str | None, facts: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trilevel", description="Train Vision Transformers and leave out what training does not need."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_config(command: argparse.ArgumentParser, optional: bool = False) -> None:
        command.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML of the run")
        command.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings that differ from the file")

    c = add("train", _train, "train as CONFIG says")
    add_config(c)
    c.add_argument("--check", action="store_true", help="validate everything, print the plan, train nothing")
    c.add_argument("--resume", action="store_true", help="go on from the newest checkpoint (start where there is none)")

    c = add("pack", _pack, "pack images into webdataset shards with an index")
    c.add_argument(
        "source", metavar="SRC", help="class folders, flat `<class>_...` files, a tar of either, a tar of tars, sklearn:digits"
    )
    c.add_argument("destination", metavar="DST")
    c.add_argument("--labels", metavar="FILE", help="labels of a flat folder or tar")
    c.add_argument("--name", default="train", help="name of the split where the source has none (default: train)")
    c.add_argument("--seed", type=int, default=0, help="of the one shuffle (default: 0)")
    c.add_argument("--shard-size", type=float, default=128, metavar="MIB", help="bytes of images per shard (default: 128 MiB)")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument(
        "--short-side", type=int, metavar="PX", help="shrink images to this short side; changes pixels, and says so in runs"
    )
    c.add_argument("--quality", type=int, help="JPEG quality of shrunk images (default: 90)")

    def add_storage(command: argparse.ArgumentParser) -> None:
        command.add_argument("--index", metavar="DIR", help="folder of the index, as data.index (default: beside the shards)")
        command.add_argument("--cache", metavar="DIR", help="as data.cache: remote shards pass through it (~/.cache/trilevel)")
        command.add_argument("--cache-size", type=float, default=64.0, metavar="GIB", help="as data.cache_size (default: 64)")
        command.add_argument("--allow-pipe", action="store_true", help="as data.allow_pipe: run pipe: shards in a shell")

    c = add("index", _index, "index shards that were made elsewhere, local or remote, in one parallel pass")
    c.add_argument("shards", metavar="SHARDS", help="path, glob or brace pattern; http(s):// or s3:// pattern")
    c.add_argument("--labels", default="cls", help="cls, json:FIELD, key or file:PATH (default: cls)")
    c.add_argument("--workers", type=int, default=8)
    add_storage(c)

    c = add(
        "verify", _verify, "decode every image of indexed shards and list the broken ones (exit code 1 where there are any)"
    )
    c.add_argument("shards", metavar="SHARDS")
    c.add_argument("--labels", default="cls")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument("--json", metavar="FILE")
    add_storage(c)

    c = add("eval", _eval, "score a run, a weights file or a timm model on the validation shards of CONFIG")
    c.add_argument("model", metavar="RUN|WEIGHTS|timm:NAME")
    add_config(c, optional=True)
    c.add_argument("--densities", metavar="1.0,0.7,0.5", help="keep ratios to walk through with the same weights")
    c.add_argument("--json", metavar="FILE")

    c = add("parity", _parity, "train CONFIG's dense recipe beside timm's own pieces and name the first difference")
    add_config(c)
    c.add_argument("--steps", type=int, default=200)
    c.add_argument("--json", metavar="FILE")

    c = add("replay", _replay, "rebuild one global batch of a run: ids, augmentation, pictures as the model saw them")
    c.add_argument("run_directory", metavar="RUN")
    c.add_argument("overrides", metavar="key.sub=value", nargs="*", help="e.g. data.train=PATTERN where the shards moved")
    c.add_argument("--step", type=int, required=True, help="as the journal counts: the first batch of a run is step 1")
    c.add_argument("--out", metavar="DIR", help="default: RUN/replay/step-STEP")
    c = add(
        "audit", _audit, "make the hash chain of what a run saw again and count presentations (exit code 1 on a difference)"
    )
    c.add_argument("run_directory", metavar="RUN")
    c.add_argument("overrides", metavar="key.sub=value", nargs="*", help="e.g. data.train=PATTERN where the shards moved")
    c.add_argument("--json", metavar="FILE")
    bench = commands.add_parser("bench", help="measure: input, step", description="Measure a part of a run by itself.")
    benches = bench.add_subparsers(required=True, metavar="PART")
    text = "our stream against decoding alone and other loaders, on the same images with the same workers"
    c = benches.add_parser("input", help=text, description=text)
    c.set_defaults(run=_bench_input)
    add_config(c)
    c.add_argument("--images", metavar="PATH", help="folder or tar of images (default: the first 2,000 of data.train)")
    c.add_argument("--workers", type=int, default=2, help="decoding processes of every loader (default: 2)")
    c.add_argument("--batch", type=int, default=50, help="default: 50")
    c.add_argument("--passes", type=int, default=5, help="measured ones, after one to warm up (default: 5)")
    c.add_argument("--rows", metavar="ours,timm,...", help="only these rows")
    c.add_argument("--json", metavar="FILE")
    c.add_argument("--plan-only", action="store_true", help="measure the order alone, no images needed")
    c.add_argument("--examples", type=int, default=1_281_167)
    c.add_argument("--shards", type=int, default=1024)
    c.add_argument("--world", type=int, default=8)
    c = add("show", _show, "pictures of what an image keeps, tokens and connections, and of the examples forgotten most")
    c.add_argument("run_directory", metavar="RUN")
    c.add_argument("images", metavar="IMAGE", nargs="*", help="image files")
    c.add_argument("--token", type=int, metavar="N", help="patch whose connections are drawn (default: one near the middle)")
    c.add_argument("--out", metavar="DIR", help="default: RUN/show")
    text = "step time and memory under each plan of CONFIG, against its dense control and plain timm, interleaved"
    c = benches.add_parser("step", help=text, description=text)
    c.set_defaults(run=_bench_step)
    add_config(c)
    c.add_argument("--against", metavar="CONFIG", help="another configuration, at its final plan (default: CONFIG, all dense)")
    c.add_argument("--pairs", type=int, default=30, help="rounds over all rows (default: 30)")
    c.add_argument("--json", metavar="FILE")
    c = add("report", _report, "table and picture of a run")
    c.add_argument("run_directory", metavar="RUN")
    c = add("sync", _sync, "send a run's journal to MLflow, as far as it isn't there")
    c.add_argument("run_directory", metavar="RUN")
    c = add("compare", _compare, "runs side by side: table, and a page with pictures at equal time, work and accuracy")
    c.add_argument("runs", metavar="RUN", nargs="*", help="run directories")
    c.add_argument("--experiment", metavar="NAME", help="all runs of an MLflow experiment instead")
    c.add_argument("--uri", help="of the tracking server (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    c.add_argument("--base", metavar="NAME", help="the run that speedups refer to (default: the first dense one)")
    c.add_argument("--out", metavar="DIR", default="compared", help="where page and tables go (default: compared)")
    c = add("doctor", _doctor, "what this machine has and lacks, one line each with the way out")
    c.add_argument("--hosts", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
