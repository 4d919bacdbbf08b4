"""The command line: `trilevel COMMAND`, the same as `python -m trainer COMMAND`. Errors are one message and exit code 2."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.arguments import parse
from trainer.benches import BENCHES
from trainer.commands import configuration, show_table, write_json
from trainer.stopping import deaf
from trainer.values import ConfigError

STOPPED = 75  # EX_TEMPFAIL: preempted with a checkpoint, start the same command again with --resume


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        code = int(COMMANDS[arguments.command](arguments) or 0)
        sys.stdout.flush()
        if words is None and arguments.command == "train":  # the process ends; a caller that gave `words` keeps its signals
            deaf()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141  # as a shell tells a SIGPIPE
        if not _is_ours(error):
            raise
        print(f"trilevel: {error}", file=sys.stderr)
        return 2


def _unread() -> bool:
    """Whether nobody reads our output any more (`| head`), rather than a connection's other end; the rest of it then goes nowhere."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)  # errors are always told
    if not look.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _is_ours(error: Exception) -> bool:
    """Errors written for the user: no stack is shown for them. They all come from our own modules."""
    return type(error).__module__.split(".")[0] in ("trainer", "sparsity")


def _train(a: argparse.Namespace) -> int:
    config = configuration(a)
    if a.check:
        from trainer.check import check

        checked = check(config, int(os.environ.get("TRILEVEL_WORLD") or os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            show_table(checked.table())
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
    from trainer.data.quality import runs_of_class

    cache = cache_at(a.cache, a.cache_size)
    index = build_index(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache, allow_pipe=a.allow_pipe)
    print(f"{a.shards}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards; index: {index.path}")
    share, chance = runs_of_class(index)
    if share > 0.5 and share > 2 * chance:
        print(
            f"sorted by class: {share:.0%} of neighbours share a label ({chance:.1%} when shuffled); `trilevel train CONFIG --check` says "
            "how well a run's order mixes them, `trilevel pack` shuffles"
        )


def _verify(a: argparse.Namespace) -> int:
    from trainer.data.cache import cache_at
    from trainer.data.remote import scheme
    from trainer.data.verify import verify

    cache = cache_at(a.cache, a.cache_size) if scheme(a.shards) or a.cache else None
    broken = verify(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache, allow_pipe=a.allow_pipe)
    for example in broken:
        print(f"{example.id}\t{example.where}\t{example.reason}")
    print(f"{a.shards}: {len(broken)} broken image(s)")
    write_json(a.json, [example._asdict() for example in broken])
    return int(bool(broken))


def _eval(a: argparse.Namespace) -> None:
    from trainer.score import score

    if a.config and "=" in a.config:  # `eval RUN key=value`: the run's own configuration, changed
        a.config, a.overrides = None, [a.config, *a.overrides]
    rows = score(a.model, configuration(a) if a.config else None, _densities(a.densities), a.overrides)
    show_table(rows.table())
    write_json(a.json, rows.facts())


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

    certificate = parity(configuration(a), steps=a.steps)
    print(certificate)
    if a.json:
        certificate.write(Path(a.json))
    return 0 if certificate.equal else 1


def _replay(a: argparse.Namespace) -> None:
    from trainer.past import Past
    from trainer.replay import replay, write

    replayed = replay(Past(a.run_directory, a.overrides), a.step)
    show_table(replayed.table())
    print(replayed.text())
    for path in write(replayed, Path(a.out or f"{a.run_directory}/replay/step-{a.step:08d}")):
        print(path)


def _audit(a: argparse.Namespace) -> int:
    from trainer.audit import audit
    from trainer.past import Past

    found = audit(Past(a.run_directory, a.overrides))
    show_table(found.table())
    print(found.text())
    write_json(a.json, found.facts())
    return 0 if found.equal else 1


def _show(a: argparse.Namespace) -> None:
    from trainer.show import show

    out = Path(a.out or f"{a.run_directory}/show")
    words = [*a.images, *a.overrides]  # the latter: what stood behind an option
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    images = [word for word in words if word not in settings]
    for path in show(a.run_directory, images, out, a.token, settings):
        print(path)


def _kept(a: argparse.Namespace) -> None:
    from trainer.keptlist import kept_of, write
    from trainer.past import Past

    past = Past(a.run_directory, a.overrides)
    kept = kept_of(past, a.epoch)
    show_table(kept.table())
    for path in write(kept, past, Path(a.out or f"{a.run_directory}/kept/lists")):
        print(path)
    write_json(a.json, kept.facts())


def _plan(a: argparse.Namespace) -> None:
    from trainer.plan_cost import plan, read

    planned = plan(configuration(a), read(a.measured), a.nodes, a.processes, a.bandwidth, a.cores)
    show_table(planned.table())
    print(planned.text())
    write_json(a.json, planned.facts())


def _export(a: argparse.Namespace) -> None:
    from trainer.export import export

    print(export(a.run_directory, a.out, a.checkpoint, a.ema).text())


def _sync(a: argparse.Namespace) -> int:
    from trainer.tracking import sync

    done = sync(Path(a.run_directory))
    print(done.message)
    return 0 if done.done else 1


def _report(a: argparse.Namespace) -> None:
    from trainer.report import picture, summary, where_to_look

    show_table(summary(a.run_directory).table)
    print(f"picture: {picture(a.run_directory)}")
    print(where_to_look(a.run_directory))


def _compare(a: argparse.Namespace) -> None:
    from trainer import compare_page
    from trainer.compare import compare, from_mlflow

    if not a.runs and not a.experiment:
        raise ConfigError("compare: name run directories, or an MLflow experiment with --experiment NAME")
    theirs, missing = from_mlflow(a.experiment, Path(a.out) / "runs", a.uri) if a.experiment else ([], [])
    found = compare([*map(Path, a.runs), *theirs], base=a.base, missing=missing)
    show_table(compare_page.table(found))
    for text in compare_page.warnings(found):
        print(f"mind: {text}")
    for path in compare_page.write(found, Path(a.out)):
        print(path)


def _doctor(a: argparse.Namespace) -> int:
    from trainer.doctor import main as doctor

    return doctor(a.hosts, a.ssh_config)


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "train": _train,
    "pack": _pack,
    "index": _index,
    "verify": _verify,
    "eval": _eval,
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
    **BENCHES,
}


if __name__ == "__main__":
    sys.exit(main())
