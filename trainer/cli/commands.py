"""One handler per command of `trilevel`, here and in `data_commands`, `model_commands`, `run_commands`, `bench`. Each imports what it
needs when it runs, so `--help` stays fast."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cli import bench, data_commands, model_commands, run_commands
from trainer.cli.output import configuration, show, show_table, write_json
from trainer.config.errors import ConfigError

STOPPED = 75  # EX_TEMPFAIL: preempted after saving a checkpoint; run the same command again with --resume


def _train(a: argparse.Namespace) -> int:
    config = configuration(a)
    if a.resume and not any(text.startswith(("name=", "runs=")) for text in a.overrides):
        from trainer.run.directory import refuse_renamed

        refuse_renamed(Path(a.config), config.directory())
    if a.check:
        from trainer.preflight.check import check

        checked = check(config, int(os.environ.get("TRILEVEL_WORLD") or os.environ.get("WORLD_SIZE", "1")), a.resume)
        if os.environ.get("RANK", "0") == "0":
            show_table(checked.table())
            show(checked.text())
        if checked.refused:
            raise ConfigError(checked.refused)
        return 0
    from trainer.storage.exit_code import forget_exit_code
    from trainer.train import train

    forget_exit_code()
    ended = train(config, resume=a.resume)
    code = STOPPED if ended.status == "preempted" else 0
    if exit_file := os.environ.get("TRILEVEL_EXIT_FILE"):  # read by `launch`: torchrun treats any other exit code as a crash
        try:
            if os.environ.get("RANK", "0") == "0":
                Path(exit_file).write_text(str(code))
        except OSError:  # a full disk; a launcher of one process still gets the code itself
            return code
        return 0
    return code


def _config(a: argparse.Namespace) -> None:
    from trainer.config import reference

    if a.markdown and a.key is not None:
        raise ConfigError(f"config {a.key} --markdown: the page has all keys; leave {a.key} out, or --markdown")
    if a.markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.text(reference.all_keys() if a.key is None else reference.select(a.key)))


def _parity(a: argparse.Namespace) -> int:
    from trainer.preflight.parity import parity

    certificate = parity(configuration(a), steps=a.steps, progress=True)
    show(certificate)
    if a.json:
        certificate.write(Path(a.json))
    return 0 if certificate.equal else 1


def _estimate(a: argparse.Namespace) -> None:
    from trainer.preflight import fault_simulation as faults
    from trainer.preflight.estimate import estimate, read
    from trainer.preflight.fault_costs import measured_costs

    given = (a.start_seconds, a.save_seconds, a.restart_seconds)
    if not a.mtbf and given != (None, None, None):
        raise ConfigError("--start-seconds, --save-seconds, --restart-seconds: only with --mtbf, e.g. --mtbf 3h")
    config, mtbf = configuration(a), [faults.parse_mtbf(text) for text in a.mtbf]
    found = estimate(config, read(a.measured), a.nodes, a.processes, a.bandwidth, a.cores)
    facts = found.facts()
    show_table(found.table())
    show(found.text())
    if mtbf:
        costs = measured_costs(filter(os.path.isdir, a.measured), *given)
        under = faults.forecast(
            found.hours, found.steps, config.epochs, config.checkpoint.every, config.engine.timeout, mtbf, costs
        )
        show_table(under.table())
        show(under.text())
        facts["faults"] = under.facts()
    write_json(a.json, facts)


def _doctor(a: argparse.Namespace) -> int:
    from trainer.preflight.doctor import main as doctor

    return doctor(a.hosts, a.ssh_config)


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "train": _train,
    "config": _config,
    "pack": data_commands.pack,
    "init": data_commands.init,
    "index": data_commands.index,
    "verify": data_commands.verify,
    "eval": model_commands.evaluate,
    "calibrate": model_commands.calibrate,
    "parity": _parity,
    "replay": run_commands.replay,
    "audit": run_commands.audit,
    "show": run_commands.show_run,
    "kept": run_commands.kept,
    "estimate": _estimate,
    "export": model_commands.export,
    "report": run_commands.report,
    "sync": run_commands.sync,
    "compare": run_commands.compare,
    "doctor": _doctor,
    **{f"bench {part}": bench.bench for part in bench.PARTS},
}
