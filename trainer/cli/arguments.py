"""The commands of `trilevel` and their options. Those of data sets and of `bench` are in `data_arguments` and
`bench_arguments`, what a command does is in `commands`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from functools import partial
from typing import Any

from trainer.cli.bench_arguments import add_benches
from trainer.cli.data_arguments import add_data_commands
from trainer.cli.shared_arguments import add_command, add_config, add_pipe


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The parsed arguments, the command's name as `command`. Prints the usage and exits with code 2 where they are invalid."""
    parser = argparse.ArgumentParser(
        "trilevel", description="Train Vision Transformers on fewer examples, tokens, attention connections and weights."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_training(commands)
    add_data_commands(commands)
    _add_before_a_run(commands)
    _add_after_a_run(commands)
    _add_results(commands)
    add_benches(
        commands.add_parser(
            "bench",
            help="measure: input, remote, step, study, inference, engine, gpu-counts, journal, checkpoint",
            description="Measure one part of a run in isolation.",
        )
    )
    # launchers pass the permission on as `data.allow_pipe=true`; it is an option of the command line, never a setting of a run
    words = ["--allow-pipe" if word == "data.allow_pipe=true" else word for word in (sys.argv[1:] if words is None else words)]
    # overrides may follow an option: `train CONFIG --resume optim.lr=...`
    arguments, rest = parser.parse_known_args(words)
    settings, wrong = hasattr(arguments, "overrides"), next((word for word in rest if word.startswith("-")), None)
    if wrong is not None:
        usage = commands.choices[arguments.command.partition(" ")[0]].format_usage()
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_meant(wrong, re.findall(r'--[a-z-]+', usage), settings)}")
    if rest and not settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _meant(word: str, options: list[str], settings: bool) -> str:
    """What may be meant by an unknown option: a setting written as one, or another option of the command."""
    from trainer.config.errors import did_you_mean
    from trainer.config.reference import all_keys

    name, _, value = word.lstrip("-").partition("=")
    keys = [key.name for key in all_keys()]
    found = next((key for key in keys if settings and name in (key, key.rpartition(".")[2])), None)
    if found:
        return f"; a setting is written without dashes: {found}={value or 'VALUE'}"
    near = did_you_mean(f"--{name}", options)
    return f"; {near}" if near else ""


def _add_training(commands: Any) -> None:
    """Train, and what can be set."""
    add = partial(add_command, commands)
    c = add("train", "train the run described by CONFIG")
    add_config(c)
    c.add_argument(
        "--check", action="store_true", help="validate configuration and data, print the plan of keep ratios, do not train"
    )
    c.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint (start from scratch if there is none)"
    )

    c = add("config", "print the keys of a configuration: type, default, unit, meaning")
    c.add_argument("key", metavar="KEY", nargs="?", help="a key or a section, e.g. data.lanes or tokens (default: all)")
    c.add_argument("--markdown", action="store_true", help="the whole reference, as docs/configuration.md has it")


def _add_before_a_run(commands: Any) -> None:
    """Before the GPU-hours are spent."""
    add = partial(add_command, commands)
    c = add("parity", "train CONFIG's dense recipe beside timm's own components and report the first difference")
    add_config(c)
    c.add_argument("--steps", type=int, default=200)
    c.add_argument("--json", metavar="FILE")

    c = add(
        "estimate",
        "hours, device hours and bottleneck of a run on N nodes, from measurements (simulated, not run)",
        before="plan",
    )
    add_config(c)
    c.add_argument("--nodes", type=int, required=True, metavar="N")
    c.add_argument("--processes", type=int, default=1, metavar="N", help="devices per node (default: 1)")
    c.add_argument(
        "--from", dest="measured", metavar="BENCH", action="append", required=True,
        help="JSON of `bench step` or `bench input`, or the directory of a short run of one process; repeatable",
    )  # fmt: skip
    c.add_argument(
        "--bandwidth", type=float, metavar="GB/s", help="network bandwidth per node; on one node: between its processes"
    )
    c.add_argument("--cores", type=int, default=os.cpu_count() or 1, metavar="C", help="CPU cores per node (default: as here)")
    c.add_argument(
        "--mtbf", action="append", default=[], metavar="3h",
        help="simulate faults too: mean time between two faults of the job, as 3h, 10min, 90s or 2d; goodput and the best "
        "checkpoint.every; repeatable",
    )  # fmt: skip
    c.add_argument(
        "--start-seconds", type=float, metavar="S", help="with --mtbf: start of the job to its first step (default: from RUN)"
    )
    c.add_argument(
        "--restart-seconds", type=float, metavar="S",
        help="with --mtbf: from a fault to the start of the next processes (default: from RUN if it was restarted, else 30)",
    )  # fmt: skip
    c.add_argument(
        "--save-seconds", type=float, metavar="S", help="with --mtbf: a checkpoint, all of it blocking (default: from RUN)"
    )
    c.add_argument("--json", metavar="FILE")
    c = add(
        "doctor",
        "check this machine: libraries, GPUs, disk, network; one line per check, with a remedy (exit code 1 on a failure)",
    )
    c.add_argument("--hosts", metavar="FILE", help="hostfile, one host per line: check each over ssh too")
    c.add_argument("--ssh-config", metavar="FILE", help="used by ssh instead of ~/.ssh/config")


def _add_after_a_run(commands: Any) -> None:
    """What looks into a run."""
    add = partial(add_command, commands)
    c = add("eval", "evaluate a run, a weights file or a timm model on the validation shards of CONFIG")
    c.add_argument("model", metavar="RUN|WEIGHTS|timm:NAME")
    add_config(c, optional=True)
    c.add_argument(
        "--densities",
        metavar="1.0,0.7,0.5",
        help="densities: keep ratios of tokens to evaluate with the same weights, with all connections kept",
    )
    c.add_argument(
        "--adaptive",
        action="store_true",
        help="beside each density: another number of tokens per image, by the thresholds of `trilevel calibrate`",
    )
    c.add_argument("--random", action="store_true", help="beside each density: as many random tokens")
    c.add_argument("--least", action="store_true", help="beside each density: as many tokens of the lowest importance")
    c.add_argument(
        "--teacher",
        metavar="RUN|WEIGHTS",
        help="also print how well the importance of tokens ranks them as the last block of this network does (Spearman); beside each "
        "density: as many tokens by that ranking",
    )
    c.add_argument(
        "--plots",
        metavar="DIR",
        help="write densities.png (accuracy against rate) and, with --adaptive, images.png (images with the fewest and most tokens)",
    )
    c.add_argument("--json", metavar="FILE")

    c = add("calibrate", "find the mass thresholds of a run or a weights file for mean densities, from training images")
    c.add_argument("model", metavar="RUN|WEIGHTS")
    add_config(c, optional=True)
    c.add_argument("--density", required=True, metavar="0.7,0.5", help="wanted mean densities: share of the tokens that stay")
    c.add_argument("--images", type=int, default=5000, metavar="N", help="training images, drawn by seed (default: 5000)")
    c.add_argument("--json", metavar="FILE")

    c = add("replay", "rebuild one global batch of a run: ids, augmentation, images as given to the model")
    _add_run(c)
    c.add_argument("--step", type=int, required=True, help="step number as in the journal: the first batch of a run is step 1")
    c.add_argument("--out", metavar="DIR", help="default: RUN/replay/step-STEP")
    c = add("audit", "recompute a run's hash chain and count how often each example was shown (exit code 1 on a difference)")
    _add_run(c)
    c.add_argument("--json", metavar="FILE")
    c = add(
        "show",
        "draw the tokens and connections that an image keeps, the most forgotten examples, or (--weights) the kept weights",
    )
    _add_run(c, overrides=False)
    c.add_argument(
        "images", metavar="IMAGE | key.sub=value", nargs="*", help="image files; settings to change, e.g. data.train=PATTERN"
    )
    c.add_argument(
        "--token", type=int, metavar="N", help="patch whose connections are drawn (default: the kept one nearest to the middle)"
    )
    c.add_argument("--weights", action="store_true", help="draw the kept weights of each layer instead (weights.method)")
    c.add_argument("--out", metavar="DIR", help="default: RUN/show")
    c.set_defaults(overrides=[])
    c = add("kept", "write the list of examples that an epoch of a run showed, and the keep ratio of each class")
    _add_run(c)
    c.add_argument("--epoch", type=int, help="epoch, counted from 0 (default: the newest)")
    c.add_argument("--out", metavar="DIR", help="default: RUN/kept/lists")
    c.add_argument("--json", metavar="FILE")


def _add_results(commands: Any) -> None:
    """What hands on or compares results."""
    add = partial(add_command, commands)
    c = add("export", "write a run's weights as safetensors that timm loads, from any ZeRO stage, or as ONNX at one density")
    _add_run(c, overrides=False)
    c.add_argument("out", metavar="OUT.safetensors|OUT.onnx")
    c.add_argument("--density", metavar="SHARE", help="for ONNX: keep ratio of tokens of the file, 1 = all")
    c.add_argument("--adaptive", action="store_true", help=argparse.SUPPRESS)  # refused, with the remedy
    c.add_argument(
        "--int8", action="store_true", help="for ONNX: int8 weights and activations, calibrated with training images"
    )
    c.add_argument("--calibration", type=int, metavar="N", help="training images for --int8 (default: 256)")
    chosen = c.add_mutually_exclusive_group()
    chosen.add_argument("--ema", action="store_const", const=True, help="the EMA weights (default if the run has them)")
    chosen.add_argument("--raw", dest="ema", action="store_const", const=False, help="the raw weights")
    forms = c.add_mutually_exclusive_group()
    forms.add_argument(
        "--compact",
        dest="form",
        action="store_const",
        const="compact",
        default="dense",
        help="of a run that pruned units or heads: smaller dense layers (for ONNX too)",
    )
    forms.add_argument(
        "--blocks", dest="form", action="store_const", const="blocks",
        help="of a run that pruned columns or rows of blocks: the kept ones, with their indices",
    )  # fmt: skip
    c.add_argument("--checkpoint", default="latest", metavar="latest|best|PATH", help="default: latest")
    c = add("report", "print the table of a run and draw its plot")
    _add_run(c, overrides=False)
    c = add("sync", "send the lines of a run's journal that MLflow does not have yet")
    _add_run(c, overrides=False)
    c = add("compare", "compare runs: a table, and an HTML page with plots over time, device hours, multiply-adds and images")
    c.add_argument("runs", metavar="RUN", nargs="*", help="run directories")
    c.add_argument("--experiment", metavar="NAME", help="add all runs of an MLflow experiment")
    c.add_argument("--uri", help="tracking URI of MLflow (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    c.add_argument(
        "--base",
        metavar="NAME",
        help="the run that speedups refer to (default: the dense run if there is exactly one, else the first)",
    )
    c.add_argument(
        "--study",
        metavar="FILE",
        nargs="+",
        default=[],
        help="instead of runs: the page of these studies, from their kept journals",
    )
    c.add_argument(
        "--journals", metavar="DIR", default="docs/results/study", help="kept journals (default: docs/results/study)"
    )
    c.add_argument(
        "--out",
        metavar="DIR",
        help="output folder (default: compared); with --study the page (default: FOLDER.md of --journals FOLDER)",
    )
    c.add_argument("--json", metavar="FILE", help="the numbers: means, standard deviations, 95 %% intervals")


def _add_run(command: argparse.ArgumentParser, overrides: bool = True) -> None:
    command.add_argument("run_directory", metavar="RUN")
    add_pipe(command)
    if overrides:
        command.add_argument(
            "overrides",
            metavar="key.sub=value",
            nargs="*",
            help="settings to change, e.g. data.train=PATTERN if the shards moved",
        )
