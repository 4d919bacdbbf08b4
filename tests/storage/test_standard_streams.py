"""Output that is not read: a run leaves lines out and goes on; a signal ends it."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.conftest import ROOT, environment
from trainer.storage import standard_streams as module
from trainer.storage.standard_streams import Bounded

RUN = """
import sys
from trainer.run.shutdown import install_handlers
from trainer.storage import standard_streams
standard_streams.WAIT = 0.5
standard_streams.guard_standard_streams(forgive=True)
stop = install_handlers()
print("ready", file=sys.stderr, flush=True)
while not stop.requested():
    print("y" * 9000, flush=True)
sys.exit(75)
"""


def fill(file: int) -> None:
    os.set_blocking(file, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(file, b"x" * size)
    os.set_blocking(file, True)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_a_signal_ends_a_run_whose_output_is_not_read(pipe: tuple[int, int]) -> None:
    """`trilevel train c.yaml | tee log` with a stopped tee stood still, and SIGTERM did nothing."""
    fill(pipe[1])
    words = [sys.executable, "-c", RUN]
    run = subprocess.Popen(words, stdout=pipe[1], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    try:
        assert run.stderr is not None and run.stderr.readline() == "ready\n"
        time.sleep(0.2)  # it waits for space
        run.send_signal(signal.SIGTERM)
        assert run.wait(25) == 75
        assert run.stderr.read().count("output is not read") == 1
    finally:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "not permitted"])
def test_lines_are_left_out_until_there_is_space_again(
    kind: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "WAIT", 0.3)
    if kind == "not permitted":
        monkeypatch.setattr(Bounded, "_nonblocking", lambda *_: -1)
    reader, writer = pty.openpty() if kind == "terminal" else pipe
    with open(os.dup(writer), "w") as file:
        stream = cast(Any, Bounded(file))
        print("first", file=stream, flush=True)
        assert os.read(reader, 100).split() == [b"first"]
        if kind == "terminal":
            termios.tcflow(writer, termios.TCOOFF)  # Ctrl-S
        else:
            fill(writer)
        began = time.monotonic()
        for _ in range(20):
            print("lost" * 3000, file=stream, flush=True)
        assert 0.25 < time.monotonic() - began < 5, "one wait, not one per line"
        assert caplog.text.count("output is not read") == 1
        if kind == "terminal":
            termios.tcflow(writer, termios.TCOON)
        else:
            os.read(reader, 1 << 20)
        for _ in range(50):  # a terminal takes text a moment after Ctrl-Q; what is printed until then is left out
            print("last", file=stream, flush=True)
            if select.select([reader], [], [], 0.1)[0] and os.read(reader, 1 << 20).split() == [b"last"]:
                break
        else:
            pytest.fail("nothing is printed although there is space again")
        assert os.get_blocking(writer), "others share it"
    if kind == "terminal":
        os.close(reader)
        os.close(writer)


def test_a_slow_reader_gets_every_byte(pipe: tuple[int, int]) -> None:
    reader = subprocess.Popen(["sh", "-c", "sleep .3; wc -c"], stdin=pipe[0], stdout=subprocess.PIPE, text=True)
    with open(os.dup(pipe[1]), "w") as file:
        stream = cast(Any, Bounded(file))
        print("z" * 99_999, file=stream, flush=True)
        del stream  # closes its own descriptor
    keep, os_null = pipe[1], os.open(os.devnull, os.O_WRONLY)
    os.dup2(os_null, keep)  # the last writer: wc ends
    os.close(os_null)
    assert reader.communicate(timeout=20)[0].strip() == "100000"
