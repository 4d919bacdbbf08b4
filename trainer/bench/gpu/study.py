"""`make gpu PART=study OUT=FOLDER`: a few runs of a study per sitting, and the table so far. The next sitting continues.

Runs and kept journals are in OUT/study. A sitting is the next ARMS unfinished arms of one seed; after LIMIT seconds its run is asked to
stop: it saves and ends. The shards are in OUT/shards/cifar10 or shards/cifar10 of the repository.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.bench.gpu import processes
from trainer.bench.gpu.jobs import trilevel
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.config.strict_yaml import load_yaml
from trainer.storage.source_tree import SOURCE_ROOT, python_path

STUDY = "configs/studies/cifar10_full.yaml"
SHARDS, PACK = Path("shards") / "cifar10", "trilevel pack cifar-10-python.tar.gz"
SPLITS = {"data.train": "train-*.tar", "data.validation": "test-*.tar"}
ARMS = 3  # the launcher checks each before it trains, which takes seconds
LIMIT, TO_SAVE = 190, 30  # seconds; together less than the limit of a part
TINY = """\
name: tiny
question: Does a sitting of a study run, keep its journals, and add to its table?
config: {config}
reference: dense
seeds: [0]
settings:
  epochs: 1
  tracking.to: journal
  control: 0
  data.workers: 0
  model.args: {{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}}
  tokens: {{method: all}}
  connections: {{method: all}}
  plan.warmup: 0ep
  plan.length: 1ep
  optim.warmup: 0ep
arms:
  dense: {{examples: {{method: all}}}}
  random_epoch: {{examples: {{method: random_epoch, removed: 0.2}}}}
"""


def part(host: Host) -> Iterator[Row]:
    """tiny: two arms of one epoch on digits."""
    out = (host.out or Path(tempfile.mkdtemp(prefix="gpu-study-"))).resolve()
    folder, journals = out / "study", out / "study" / "journals"
    folder.mkdir(parents=True, exist_ok=True)
    file = SOURCE_ROOT / STUDY
    settings = [f"runs={folder / 'runs'}"]
    if host.tiny:
        file, shards = folder / "tiny.yaml", folder / "shards" / "digits"
        file.write_text(TINY.format(config=SOURCE_ROOT / "configs" / "quickstart.yaml"))
        if not shards.is_dir():
            yield "pack digits", lambda: trilevel(folder, "pack", "sklearn:digits", str(shards))
        settings += [f"data.{split}={shards}/{split}-*.tar" for split in ("train", "validation")]
    else:
        settings += shards_of(out)
    words = [sys.executable, "-m", "launch", "study", str(file), "--journals", str(journals), *settings]
    words += ["--processes", "1"] if host.tiny else []
    yield "sitting", lambda: next_runs(words, file, journals, 3 * LIMIT if host.tiny else LIMIT)
    yield from table(file, journals)


def shards_of(out: Path) -> list[str]:
    """As settings. Raises FileNotFoundError naming what is missing and the command that makes it."""
    folders = [out / SHARDS, SOURCE_ROOT / SHARDS]
    for folder in folders:
        if all(any(folder.glob(pattern)) for pattern in SPLITS.values()):
            return [f"{key}={folder / pattern}" for key, pattern in SPLITS.items()]
    raise FileNotFoundError(
        f"{STUDY}: {' and '.join(SPLITS.values())} are neither in {folders[0]} nor in {folders[1]}; make them: {PACK} {folders[0]}"
    )


def left(file: Path, journals: Path) -> list[tuple[int, str]]:
    """(seed, arm) of the runs without a kept journal, in the order in which the launcher trains."""
    study = load_yaml(file.read_text(encoding="utf-8"))
    kept = journals / study["name"]
    runs = ((seed, arm) for seed in study.get("seeds", [0]) for arm in study["arms"])
    return [(seed, arm) for seed, arm in runs if not (kept / f"{arm}-seed{seed}.jsonl.xz").is_file()]


def next_runs(words: Sequence[str], file: Path, journals: Path, limit: float) -> Facts:
    """A sitting with the next arms of the first seed that is not finished; `all`: whether no run of the study is left."""
    before = left(file, journals)
    if not before:
        return {"finished_runs": len(list(journals.rglob("*.jsonl.xz"))), "all": True, "ok": True}
    seed = before[0][0]
    arms = [arm for one, arm in before if one == seed][:ARMS]
    facts = sitting([*words, "--seeds", str(seed), "--arms", ",".join(arms)], journals, limit)
    return facts | {"seed": seed, "arms": arms, "all": not left(file, journals)}


def sitting(words: Sequence[str], journals: Path, limit: float) -> Facts:
    """Start the launcher, and ask it to stop after `limit` seconds, whatever its exit code is then: a run that has not begun to train ends
    without a checkpoint. What does not end within TO_SAVE is killed. finished_runs: in all sittings; all: whether those asked for are."""
    stopped = False
    with processes.started(words, os.environ | {"PYTHONPATH": python_path()}, SOURCE_ROOT) as (process, output):
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_SAVE)
        ended: Facts = {"ok": True} if stopped else processes.result_of(process, output)
    facts: Facts = {"finished_runs": len(list(journals.rglob("*.jsonl.xz"))), "all": process.returncode == 0}
    return facts | ended


def table(file: Path, journals: Path) -> Iterator[Row]:
    """A row per arm with finished runs: seeds, top-1, multiply-adds and time relative to the reference."""
    from trainer.analysis.study.file import read
    from trainer.analysis.study.results import result

    for arm in result(read(file), journals).arms:
        facts = {"seeds": len(arm.runs), "top1": arm.top1.mean, "multiply_adds": arm.multiply_adds.mean, "time": arm.time.mean}
        yield arm.name, lambda facts=facts: facts
