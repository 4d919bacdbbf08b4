"""The commands of docs/first-hour.md, run in their order on small data sets of five layouts: from the files as people have them to weights
that give the same top-1 in plain timm."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, wait_for
from tests.support import layouts
from trainer.__main__ import main

PAGE = (ROOT / "docs" / "first-hour.md").read_text()
LAYOUTS = ("class_folders", "tiny_imagenet", "hugging_face_parquet", "hugging_face_folder", "webdataset")
ARGS = "patch_size: 16, embed_dim: 48, depth: 4, num_heads: 3"
SMALL = [
    f"model.args={{{ARGS}}}",
    "data.workers=0",
    "tracking.to=journal",
    "log_every=1step",
    "control=0",
    "evaluate.every=0ep",
    "checkpoint.every=0ep",
]
PLAIN = ["engine.kind=ddp", "engine.zero=0"]


def commands() -> list[str]:
    """The lines `$ ...` of the page up to the Python block, without those that only look."""
    found = [
        line.removeprefix("$ ") for line in PAGE.splitlines() if line.startswith(("$ trilevel", "$ python -m launch local"))
    ]
    assert len(found) >= 9
    return found


def words_of(command: str, src: Path, more: list[str]) -> list[str]:
    """The words behind `trilevel`; a launcher's command becomes that of its one process, Ctrl-C a stop after three steps."""
    words = ["train" if word == "local" else word for word in shlex.split(command, comments=True)]
    words = words[1:] if words[0] == "trilevel" else words[3:]
    words = [str(src) if word == "cifar10-small" else word for word in words]
    if words[0] == "train":
        words += more
        words += ["stop_at=3step"] if "Ctrl-C" in command else []
    return [*words[:-1], "4"] if words[0] == "init" else words


def printed(words: list[str]) -> str:
    file = io.StringIO()
    with contextlib.redirect_stdout(file):
        code = main(words)
    assert code == 0, (words, file.getvalue())
    return file.getvalue()


def in_plain_timm(split: str) -> float:
    """What the page's Python block prints for the exported file, as a share."""
    code = PAGE.split("```python\n")[1].split("```")[0]
    for theirs, ours in (
        ("num_classes=10", "num_classes=3"),
        (
            'size = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}',
            f"size = dict(img_size=64, {ARGS.replace(': ', '=')})",
        ),
        ("input_size=32", "input_size=64"),
        ("test-", f"{split}-"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    file = io.StringIO()
    with contextlib.redirect_stdout(file):
        exec(code, {})
    number, images = re.match(r"([\d.]+) % of (\d+) images", file.getvalue()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert int(images) == len(layouts.VALIDATION)
    return float(number) / 100


def journey(make: Callable[[Path], Path], folder: Path, more: list[str]) -> None:
    src, said = make(folder / "src"), {}
    for command in commands():
        words = words_of(command, src, more)
        said[words[0]] = said.get(words[0], "") + printed(words)
    assert "images per class" in said["pack"] and "dense baseline" in said["init"]
    assert "of dense" in said["train"] and "cifar10_dense" in said["compare"]
    for run in ("cifar10", "cifar10_dense"):
        steps = [line["step"] for line in lines(Path("runs", run), "step")]
        assert steps == list(range(1, len(steps) + 1)) and lines(Path("runs", run), "end")[-1]["status"] == "finished"
    everything_kept = re.search(r"topk +│ +1 │ +1 │.*? ([\d.]+) %", said["eval"])
    assert everything_kept and float(everything_kept[1]) == pytest.approx(100 * in_plain_timm("validation"), abs=0.005)
    printed(["export", "runs/cifar10_dense", "cifar10.safetensors"])
    assert in_plain_timm("validation") == pytest.approx(lines(Path("runs/cifar10_dense"), "eval")[-1]["top1"], abs=5e-5)


@pytest.mark.parametrize(
    "layout", [LAYOUTS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != LAYOUTS[1])]
)
def test_from_files_as_people_have_them_to_plain_timm(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else accelerate takes all cores, which other tests use
    journey(layouts.LAYOUTS[layout], tmp_path, [*SMALL, *PLAIN])


@pytest.mark.slow
def test_class_folders_train_and_resume_without_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))
    layouts.image_folder(tmp_path / "pets")
    printed(["init", "pets", "--epochs", "4"])
    train = ["train", "pets.yaml", *SMALL, *PLAIN, "data.workers=1"]
    said = printed([*train, "stop_at=3step"]) + printed([*train, "--resume"])
    assert "48 image files are opened one by one" in said
    printed(["audit", "runs/pets"])
    printed(["pack", "pets", "shards"])
    score = lines(Path("runs/pets"), "eval")[-1]["top1"]
    assert f" {100 * score:.2f} % " in printed(["eval", "runs/pets", "data.validation=shards/validation-*.tar"])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)  # ten starts of Python, 115 s of CPU
def test_the_commands_as_they_are_typed(tmp_path: Path) -> None:
    """In a shell, with the launcher's two processes and DeepSpeed, and stopped by Ctrl-C."""
    src, journal = layouts.image_folder(tmp_path / "src"), tmp_path / "runs" / "cifar10" / "journal.jsonl"
    for line in commands():
        words = shlex.split(line.replace("--epochs 10", "--epochs 20"), comments=True)
        words = [str(src) if word == "cifar10-small" else word for word in words]
        python = [sys.executable, "-m", "trainer", *words[1:]] if words[0] == "trilevel" else [sys.executable, *words[1:]]
        more = SMALL if "local" in words or "train" in words else []
        with subprocess.Popen(
            [*python, *more], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            if "Ctrl-C" in line:
                wait_for(lambda: journal.is_file() and journal.read_text().count('"kind":"step"') >= 3)
                process.send_signal(signal.SIGINT)
            text = process.communicate(timeout=240)[0]
        assert process.returncode == (75 if "Ctrl-C" in line else 0), f"{line}\n{text[-4000:]}"
    for run in ("cifar10", "cifar10_dense"):
        steps = [line["step"] for line in lines(tmp_path / "runs" / run, "step")]
        assert steps == list(range(1, len(steps) + 1)) and lines(tmp_path / "runs" / run, "end")[-1]["status"] == "finished"
    assert (tmp_path / "cifar10.safetensors").is_file() and (tmp_path / "compared" / "compare.html").is_file()


def test_the_page_names_every_step() -> None:
    text = " ".join(commands())
    for step in ("pack", "init", "--check", "_dense.yaml", "--resume", "compare", "export"):
        assert step in text
