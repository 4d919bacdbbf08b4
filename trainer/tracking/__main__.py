"""`python -m trainer.tracking RUN`: the process that follows a journal and uploads it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

from trainer.tracking.sync import follow, sync


class _Log(io.TextIOBase):
    """Standard output, which is the shipper's log. Output that a full disk refuses is dropped, so that it does not end the shipper."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(1, text.encode(errors="replace"))
        return len(text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description="Ship the journal of a run to MLflow.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--follow", action="store_true", help="continue while the training runs")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process id of the training")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two checks of the journal")
    parser.add_argument("--linger", type=float, default=60.0, help="seconds to continue after the training has ended")
    arguments = parser.parse_args(words)
    run = arguments.run.resolve()
    sys.stdout = sys.stderr = _Log()
    shipped = (
        follow(run, arguments.parent, arguments.every, arguments.linger) if arguments.follow else sync(run, arguments.linger)
    )
    print(time.strftime("%F %T"), shipped.message, flush=True)
    return 0 if shipped.done else 3


if __name__ == "__main__":
    sys.exit(main())
