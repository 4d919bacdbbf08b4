"""`trilevel WORD ...` that reports every fork beside a process group: a child can hang in it (CPython gh-112275)."""

from __future__ import annotations

import atexit
import os
import sys
import traceback

import torch
import torch.distributed as dist

from trainer.__main__ import main

torch.set_num_threads(1)
before = 0


def forking() -> None:
    global before
    if dist.is_initialized():
        print("forked beside a process group:", *traceback.format_stack(), file=sys.stderr)
    else:
        before += 1


os.register_at_fork(before=forking)
rank = os.getpid()
atexit.register(lambda: os.getpid() == rank and before >= 2 and print(f"forks before the process group: {before}", flush=True))
sys.exit(main(sys.argv[1:]))
