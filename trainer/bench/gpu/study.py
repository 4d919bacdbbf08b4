"""`make gpu PART=study OUT=FOLDER`: a few runs of a study per sitting, and the table so far. The next sitting continues.

Runs and kept journals are in OUT/study. After LIMIT seconds the run of this sitting is asked to stop: it saves and ends. The shards are
those that the study's configuration names, in the folder of the repository; how to make them: docs/launching.md, section Studies.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.bench.gpu.jobs import trilevel
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.storage.source_tree import SOURCE_ROOT, python_path

STUDY = "configs/studies/cifar10.yaml"
LIMIT, TO_SAVE = 200, 30  # seconds
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
    folder = (host.out or Path(tempfile.mkdtemp(prefix="gpu-study-"))).resolve() / "study"
    folder.mkdir(parents=True, exist_ok=True)
    file, settings = SOURCE_ROOT / STUDY, [f"runs={folder / 'runs'}"]
    if host.tiny:
        file, shards = folder / "tiny.yaml", folder / "shards" / "digits"
        file.write_text(TINY.format(config=SOURCE_ROOT / "configs" / "quickstart.yaml"))
        if not shards.is_dir():
            yield "pack digits", lambda: trilevel(folder, "pack", "sklearn:digits", str(shards))
        settings += [f"data.{split}={shards}/{split.removeprefix('data.')}-*.tar" for split in ("train", "validation")]
    journals = folder / "journals"
    words = [sys.executable, "-m", "launch", "study", str(file), "--journals", str(journals), *settings]
    words += ["--processes", "1"] if host.tiny else []
    yield "sitting", lambda: sitting(words, journals, 3 * LIMIT if host.tiny else LIMIT)
    yield from table(file, journals)


def sitting(words: Sequence[str], journals: Path, limit: float) -> Facts:
    """Start the launcher, and ask it to stop after `limit` seconds, whatever its exit code is then: a run that has not begun to train ends
    without a checkpoint. finished_runs: in all sittings; all: whether none is left."""
    process = subprocess.Popen(
        words, cwd=SOURCE_ROOT, env=os.environ | {"PYTHONPATH": python_path()}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    stopped = False
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        stopped = True
        process.terminate()
        try:
            output = process.communicate(timeout=TO_SAVE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    facts: Facts = {"finished_runs": len(list(journals.rglob("*.jsonl.xz"))), "all": process.returncode == 0}
    if process.returncode and not stopped:
        return facts | {"ok": False, "error": f"exit code {process.returncode}", "trace": output[-3000:]}
    return facts | {"ok": True}


def table(file: Path, journals: Path) -> Iterator[Row]:
    """A row per arm with finished runs: seeds, top-1, multiply-adds and time relative to the reference."""
    from trainer.analysis.study.file import read
    from trainer.analysis.study.results import result

    for arm in result(read(file), journals).arms:
        facts = {"seeds": len(arm.runs), "top1": arm.top1.mean, "multiply_adds": arm.multiply_adds.mean, "time": arm.time.mean}
        yield arm.name, lambda facts=facts: facts
