"""What tests/safety/test_signals.py starts: every command of `trilevel`, at work for minutes, gets a signal.

signalled_commands.py FOLDER: prints a JSON object {"COMMAND SIGNAL": [exit status, seconds until the end]}. Each command runs in a
fork of this process, which has imported everything and started no thread. At its end it joins threads and calls atexit functions, as
an interpreter does; tearing down all modules as well would take seconds.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.images import jpeg, write_shards
from tests.support.journals import CONFIG, lines, write
from trainer.__main__ import main
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.model.weights import create, save_weights
from trainer.tracking.mlflow_client import load_library

PATIENCE = 20.0  # seconds after which a command is killed
WORK = 60.0  # seconds of each item of a command's work
torch.set_num_threads(1)
folder = Path(sys.argv[1])

for number in range(4):
    path = folder / "images" / "ab"[number % 2] / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(number))
shards = write_shards(folder / "shards", [4] * 8)
build_index(shards, progress=False)
quickstart = ["configs/quickstart.yaml", f"data.train={shards}", f"data.validation={shards}", "model.classes=4", "name=x"]
save_weights(folder / "x.safetensors", create(load(quickstart[0], quickstart[1:]).model).state_dict())
silent = socket.create_server(("127.0.0.1", 0))  # accepts connections and never answers
server = f"http://127.0.0.1:{silent.getsockname()[1]}"
start, *rest = lines()
for name in ("SIGINT", "SIGTERM"):
    write(folder / f"run-{name}", [start | {"config": CONFIG | {"tracking": {"uri": server}}}, *rest])
run = str(folder / "run-{}")  # {}: the signal
(folder / "hosts").write_text("node1\nnode2\n")
load_library()

CASES: dict[str, tuple[list[str], str]] = {  # words, the function that takes minutes ("": it waits for another process)
    "pack": (["pack", str(folder / "images"), str(folder / "packed-{}"), "--workers", "2"], "trainer.data.shards.pack._write"),
    "index": (["index", shards, "--index", str(folder / "index-{}"), "--workers", "2"], "trainer.data.shards.index.scan_shard"),
    "verify": (["verify", shards, "--workers", "2"], "trainer.preflight.verify_shards.decode_exact"),
    "eval": (
        ["eval", str(folder / "x.safetensors"), *quickstart, "data.workers=1"],
        "trainer.data.loader.batch_maker.BatchMaker.batch",
    ),
    "bench": (["bench", "step", *quickstart], "trainer.bench.step.paired"),
    "audit": (["audit", run], "trainer.provenance.recorded_run.RecordedRun.__init__"),
    "report": (["report", run], "trainer.analysis.report.summary.history"),
    "compare": (["compare", run, "--out", str(folder / "compare")], "trainer.analysis.comparison.groups.history"),
    "compare --experiment": (["compare", "--experiment", "e", "--uri", server, "--out", str(folder / "compare")], ""),
    "export": (["export", run, str(folder / "out.safetensors")], "trainer.checkpoint.export._chosen"),
    "sync": (["sync", run], ""),
    "doctor": (["doctor", "--hosts", str(folder / "hosts")], "trainer.preflight.hosts._start_listener"),
}


def begin(name: str, number: signal.Signals) -> tuple[int, int]:
    """(process, descriptor on which it writes when it is at work) of a command."""
    reader, writer = os.pipe()
    words, slow = CASES[name]
    if (child := os.fork()) != 0:
        os.close(writer)
        return child, reader
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    def work(*_: Any, **__: Any) -> Any:
        os.write(writer, b"at work\n")
        time.sleep(WORK)

    if slow:
        owner, _, function = slow.rpartition(".")
        try:
            holder = importlib.import_module(owner)
        except ModuleNotFoundError:
            module, _, kind = owner.rpartition(".")
            holder = getattr(importlib.import_module(module), kind)
        setattr(holder, function, work)
    else:
        os.write(writer, b"at work\n")
    code = main([word.replace("{}", number.name) for word in words])
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] (joins threads, as the interpreter does at its end)
    atexit._run_exitfuncs()
    os._exit(code)


found: dict[str, tuple[int, float]] = {}
for name, (_, slow) in CASES.items():  # one after the other: they share two processors with other tests
    begun = {number: begin(name, number) for number in (signal.SIGINT, signal.SIGTERM)}
    for _, reader in begun.values():
        os.read(reader, 8)
    time.sleep(0.1 if slow else 2.0)  # without a word from it, the command may not have asked yet
    sent = time.monotonic()
    for number, (child, _) in begun.items():
        os.kill(child, number)
    for number, (child, reader) in begun.items():
        status, ended = 0, 0
        while not ended and time.monotonic() < sent + PATIENCE:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        took = time.monotonic() - sent
        if not ended:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        found[f"{name} {number.name}"] = os.waitstatus_to_exitcode(status), took
        os.close(reader)
print(json.dumps(found))
