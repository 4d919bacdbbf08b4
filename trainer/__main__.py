"""The command line: `trilevel COMMAND`, the same as `python -m trainer COMMAND`. Errors are one message and exit code 2."""

from __future__ import annotations

import os
import select
import sys

from trainer.cli.arguments import parse
from trainer.cli.commands import COMMANDS
from trainer.config.pipes import pipes_granted
from trainer.run.shutdown import ignore_signals


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        with pipes_granted(getattr(arguments, "allow_pipe", False)):
            code = int(COMMANDS[arguments.command](arguments) or 0)
        sys.stdout.flush()
        if words is None and arguments.command == "train":  # the process ends; a caller that gave `words` keeps its signals
            ignore_signals()
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


if __name__ == "__main__":
    sys.exit(main())
