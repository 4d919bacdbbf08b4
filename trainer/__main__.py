"""The command line: `trilevel COMMAND`, the same as `python -m trainer COMMAND`. A user error prints one message, exit code 2."""

from __future__ import annotations

import errno
import os
import select
import sys

from trainer.cli.arguments import parse
from trainer.cli.commands import COMMANDS
from trainer.cli.output import refuse_outputs
from trainer.config.errors import TrilevelError
from trainer.config.pipes import pipes_granted
from trainer.run.shutdown import end_process, ignore_signals
from trainer.storage.exit_code import write_exit_code
from trainer.storage.standard_streams import OutputError, discard_output, guard_standard_streams, open_standard_streams, say
from trainer.storage.text import printable

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, *FULL)


def main(words: list[str] | None = None) -> int:
    # Read once, when torch loads OpenMP, which nothing above does. Threads that wait for each other give the core to other processes: on
    # two cores with three times as many busy processes, two threads trained 1.9 to 3.5 times as fast as with the default, which spins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_standard_streams()
    arguments = parse(words)
    before = sys.stdout, sys.stderr
    guard_standard_streams(forgive=arguments.command == "train")
    try:
        with pipes_granted(getattr(arguments, "allow_pipe", False)):
            refuse_outputs(arguments)
            code = int(COMMANDS[arguments.command](arguments) or 0)
        sys.stdout.flush()
        if words is None and arguments.command == "train":  # the process exits; a caller with `words` does not
            ignore_signals()
            end_process(code)
        return code
    except KeyboardInterrupt as error:
        say("\n".join(["interrupted", *getattr(error, "__notes__", ())]), error=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            discard_output()
            return 141  # what a shell reports for SIGPIPE
        if isinstance(error, OutputError):
            discard_output()
        if arguments.command != "train" and isinstance(error, OSError) and error.filename and error.errno in NOT_WRITABLE:
            remedy = "free disk space" if error.errno in FULL else "make it writable, or copy the run to a folder that is"
            say(printable(f"trilevel: cannot write to {error.filename}: {error.strerror}; {remedy}"), error=True)
            return 2
        if not isinstance(error, TrilevelError):
            raise
        say(printable("\n  ".join([f"trilevel: {error}", *getattr(error, "__notes__", ())])), error=True)
        if arguments.command == "train":
            write_exit_code(error.exit_code)
        return error.exit_code
    finally:
        if words is not None:  # a caller's streams are its own
            sys.stdout, sys.stderr = before


def _stdout_closed() -> bool:
    """Whether standard output is a pipe that its reader has closed (`| head`), as opposed to a network connection."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are always reported
    return bool(poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
