"""The words of `trilevel`: every command and its options. What a command does is in `__main__`."""

from __future__ import annotations

import argparse
import os
import sys


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command, its name as `command`; leaves with exit code 2 and the usage where they make no sense."""
    parser = argparse.ArgumentParser(
        "trilevel", description="Train Vision Transformers and leave out what training does not need."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=name)
        return command

    c = add("train", "train as CONFIG says")
    _add_config(c)
    c.add_argument("--check", action="store_true", help="validate everything, print the plan, train nothing")
    c.add_argument("--resume", action="store_true", help="go on from the newest checkpoint (start where there is none)")

    c = add("pack", "pack images into webdataset shards with an index")
    c.add_argument(
        "source", metavar="SRC", help="class folders, flat `<class>_...` files, a tar of either, a tar of tars, sklearn:digits"
    )
    c.add_argument("destination", metavar="DST")
    c.add_argument("--labels", metavar="FILE", help="labels of a flat folder or tar")
    c.add_argument("--name", default="train", help="name of the split where the source has none (default: train)")
    c.add_argument("--seed", type=int, default=0, help="of the one shuffle (default: 0)")
    c.add_argument("--shard-size", type=float, default=128, metavar="MIB", help="bytes of images per shard (default: 128 MiB)")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument(
        "--short-side", type=int, metavar="PX", help="shrink images to this short side; changes pixels, and says so in runs"
    )
    c.add_argument("--quality", type=int, help="JPEG quality of shrunk images (default: 90)")

    def add_storage(command: argparse.ArgumentParser) -> None:
        command.add_argument("--index", metavar="DIR", help="folder of the index, as data.index (default: beside the shards)")
        command.add_argument("--cache", metavar="DIR", help="as data.cache: remote shards pass through it (~/.cache/trilevel)")
        command.add_argument("--cache-size", type=float, default=64.0, metavar="GIB", help="as data.cache_size (default: 64)")
        _add_pipe(command)

    c = add("index", "index shards that were made elsewhere, local or remote, in one parallel pass")
    c.add_argument("shards", metavar="SHARDS", help="path, glob or brace pattern; http(s)://, s3://, gs:// or hf:// pattern")
    c.add_argument("--labels", default="cls", help="cls, json:FIELD, key or file:PATH (default: cls)")
    c.add_argument("--workers", type=int, default=8)
    add_storage(c)

    c = add("verify", "decode every image of indexed shards and list the broken ones (exit code 1 where there are any)")
    c.add_argument("shards", metavar="SHARDS")
    c.add_argument("--labels", default="cls")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument("--json", metavar="FILE")
    add_storage(c)

    c = add("eval", "score a run, a weights file or a timm model on the validation shards of CONFIG")
    c.add_argument("model", metavar="RUN|WEIGHTS|timm:NAME")
    _add_config(c, optional=True)
    c.add_argument(
        "--densities",
        metavar="1.0,0.7,0.5",
        help="keep ratios of tokens to walk through with the same weights, all connections kept",
    )
    c.add_argument("--json", metavar="FILE")

    c = add("parity", "train CONFIG's dense recipe beside timm's own pieces and name the first difference")
    _add_config(c)
    c.add_argument("--steps", type=int, default=200)
    c.add_argument("--json", metavar="FILE")

    c = add("replay", "rebuild one global batch of a run: ids, augmentation, pictures as the model saw them")
    _add_run(c)
    c.add_argument("--step", type=int, required=True, help="as the journal counts: the first batch of a run is step 1")
    c.add_argument("--out", metavar="DIR", help="default: RUN/replay/step-STEP")
    c = add("audit", "make the hash chain of what a run saw again and count presentations (exit code 1 on a difference)")
    _add_run(c)
    c.add_argument("--json", metavar="FILE")
    _add_benches(
        commands.add_parser(
            "bench",
            help="measure: input, remote, step, engine, journal, checkpoint",
            description="Measure a part of a run by itself.",
        )
    )
    c = add("show", "pictures of what an image keeps, tokens and connections, and of the examples forgotten most")
    _add_run(c, overrides=False)
    c.add_argument(
        "images", metavar="IMAGE | key.sub=value", nargs="*", help="image files; settings that differ from the run's"
    )
    c.add_argument("--token", type=int, metavar="N", help="patch whose connections are drawn (default: one near the middle)")
    c.add_argument("--out", metavar="DIR", help="default: RUN/show")
    c.set_defaults(overrides=[])
    c = add("kept", "the examples an epoch of a run showed, written out, and the keep rate of each class")
    _add_run(c)
    c.add_argument("--epoch", type=int, help="counted from 0 (default: the newest)")
    c.add_argument("--out", metavar="DIR", help="default: RUN/kept/lists")
    c.add_argument("--json", metavar="FILE")
    c = add("plan", "what a run would take on N nodes, on paper: hours, device hours, the resource that is the wall")
    _add_config(c)
    c.add_argument("--nodes", type=int, required=True, metavar="N")
    c.add_argument("--processes", type=int, default=1, metavar="N", help="devices of a node (default: 1)")
    c.add_argument(
        "--from", dest="measured", metavar="BENCH", action="append", required=True,
        help="JSON of `bench step`, of `bench input`, a short run of one process; may be given again",
    )  # fmt: skip
    c.add_argument("--bandwidth", type=float, metavar="GB/s", help="of a node's network; on one node: between its processes")
    c.add_argument("--cores", type=int, default=os.cpu_count() or 1, metavar="C", help="of a node (default: as many as here)")
    c.add_argument("--json", metavar="FILE")
    c = add("export", "write a run's weights as safetensors that plain timm loads, whatever ZeRO stage they were trained with")
    _add_run(c, overrides=False)
    c.add_argument("out", metavar="OUT.safetensors")
    chosen = c.add_mutually_exclusive_group()
    chosen.add_argument("--ema", action="store_const", const=True, help="the moving average (default where there is one)")
    chosen.add_argument("--raw", dest="ema", action="store_const", const=False, help="the weights themselves")
    c.add_argument("--checkpoint", default="latest", metavar="latest|best|PATH", help="default: latest")
    c = add("report", "table and picture of a run")
    _add_run(c, overrides=False)
    c = add("sync", "send a run's journal to MLflow, as far as it isn't there")
    _add_run(c, overrides=False)
    c = add("compare", "runs side by side: table, and a page with pictures at equal time, work and accuracy")
    c.add_argument("runs", metavar="RUN", nargs="*", help="run directories")
    c.add_argument("--experiment", metavar="NAME", help="all runs of an MLflow experiment, beside those named")
    c.add_argument("--uri", help="of the tracking server (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    c.add_argument(
        "--base", metavar="NAME", help="the run that speedups refer to (default: the dense one if there is one, else the first)"
    )
    c.add_argument("--out", metavar="DIR", default="compared", help="where page and tables go (default: compared)")
    c = add("doctor", "what this machine has and lacks, one line each with the way out")
    c.add_argument("--hosts", metavar="FILE", help="one host per line: each is asked over ssh")
    c.add_argument("--ssh-config", metavar="FILE", help="read by ssh instead of ~/.ssh/config")
    # the grant is written like a setting too, as a launcher passes it on; it is one of this command line alone
    words = ["--allow-pipe" if word == "data.allow_pipe=true" else word for word in (sys.argv[1:] if words is None else words)]
    # overrides may stand behind an option: `train CONFIG --resume optim.lr=...`
    arguments, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _add_benches(bench: argparse.ArgumentParser) -> None:
    """`trilevel bench PART`: what each measures is in a module of its own."""
    parts = bench.add_subparsers(required=True, metavar="PART")

    def add(name: str, text: str, config: bool = True) -> argparse.ArgumentParser:
        part = parts.add_parser(name, help=text, description=text)
        part.set_defaults(command=f"bench {name}")
        if config:
            _add_config(part)
        part.add_argument("--json", metavar="FILE")
        return part

    c = add("input", "our stream against decoding alone and other loaders, on the same images with the same workers")
    c.add_argument("--images", metavar="PATH", help="folder or tar of images (default: the first 2,000 of data.train)")
    _add_loader(c, "ones")
    c.add_argument("--rows", metavar="ours,timm,...", help="only these rows")
    c.add_argument("--plan-only", action="store_true", help="measure the order alone, no images needed")
    c.add_argument("--examples", type=int, default=1_281_167)
    c.add_argument("--shards", type=int, default=1024)
    c.add_argument("--world", type=int, default=8)
    c = add("remote", "our stream from shards behind a network with latency against the same shards as files")
    c.add_argument("--latency", type=float, default=30.0, metavar="MS", help="per request (default: 30)")
    _add_loader(c, "epochs")
    c.add_argument("--limit", type=int, default=4000, metavar="IMAGES", help="first images of data.train (default: 4000)")
    c = add("step", "step time and memory under each plan of CONFIG, against its dense control and plain timm, interleaved")
    c.add_argument("--against", metavar="CONFIG", help="another configuration, at its final plan (default: CONFIG, all dense)")
    c.add_argument("--pairs", type=int, default=30, help="rounds over all rows (default: 30)")
    c = add(
        "engine",
        "what the engine costs: DDP and ZeRO 0 to 3 against the bare loop, on every device of this machine, interleaved",
    )
    c.add_argument("--images-per-device", metavar="256,32", help="batches to measure (default: 256,32; on a CPU 8,2)")
    c.add_argument("--processes", type=int, help="default: one per GPU; on a CPU 2")
    c.add_argument("--rounds", type=int, default=20, help="default: 20")
    c.add_argument("--rows", metavar="ddp,zero1,...", help="only these, beside the bare loop")
    c = add(
        "journal",
        "what a logging step costs, with the tracking server stopped, silent and running; memory of journal and shipper",
        config=False,
    )
    c.add_argument("--lines", type=int, default=2000, help="log lines towards each server (default: 2000)")
    c.add_argument("--pause", type=float, default=0.02, metavar="S", help="between two of them (default: .02)")
    c = add("checkpoint", "how long training stands still for a save, how long the disk takes, and what share of a run that is")
    c.add_argument("--saves", type=int, default=5, help="measured ones, after one to warm up (default: 5)")
    c.add_argument("--examples", type=int, default=1_281_167, help="whose statistics are saved (default: 1,281,167)")


def _add_pipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-pipe", action="store_true", help="run the commands of `pipe:COMMAND` shards in a shell")


def _add_config(command: argparse.ArgumentParser, optional: bool = False) -> None:
    _add_pipe(command)
    command.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML of the run")
    command.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings that differ from the file")


def _add_run(command: argparse.ArgumentParser, overrides: bool = True) -> None:
    command.add_argument("run_directory", metavar="RUN")
    _add_pipe(command)
    if overrides:
        command.add_argument(
            "overrides", metavar="key.sub=value", nargs="*", help="e.g. data.train=PATTERN where the shards moved"
        )


def _add_loader(part: argparse.ArgumentParser, passes: str) -> None:
    part.add_argument("--workers", type=int, default=2, help="decoding processes of every loader (default: 2)")
    part.add_argument("--batch", type=int, default=50, help="default: 50")
    part.add_argument("--passes", type=int, default=5, help=f"measured {passes}, after one to warm up (default: 5)")
