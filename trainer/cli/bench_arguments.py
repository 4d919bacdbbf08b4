"""The options of `trilevel bench PART`. What a part does is in `bench.py` beside this file."""

from __future__ import annotations

import argparse

from trainer.cli.shared_arguments import add_config


def add_benches(bench: argparse.ArgumentParser) -> None:
    """The parts of `trilevel bench`; each is measured by a module of `trainer/bench/`."""
    parts = bench.add_subparsers(required=True, metavar="PART")

    def add(name: str, text: str, config: bool = True) -> argparse.ArgumentParser:
        part = parts.add_parser(name, help=text, description=text)
        part.set_defaults(command=f"bench {name}")
        if config:
            add_config(part)
        part.add_argument("--json", metavar="FILE")
        return part

    c = add("input", "input pipeline in images/s, compared with decoding alone and with other loaders, same images and workers")
    c.add_argument("--images", metavar="PATH", help="folder or tar of images (default: the first 2,000 of data.train)")
    _add_loader(c, "passes")
    c.add_argument("--rows", metavar="ours,timm,...", help="only these rows")
    c.add_argument("--order-only", action="store_true", help="measure only the order of examples; needs no images")
    c.add_argument("--plan-only", dest="order_only", action="store_true", help=argparse.SUPPRESS)  # its name up to 0.1.0
    c.add_argument("--examples", type=int, default=1_281_167)
    c.add_argument("--shards", type=int, default=1024)
    c.add_argument("--world", type=int, default=8)
    c = add("remote", "input pipeline in images/s from shards behind a network with latency, compared with local shards")
    c.add_argument("--latency", type=float, default=30.0, metavar="MS", help="per request (default: 30)")
    _add_loader(c, "epochs")
    c.add_argument("--limit", type=int, default=4000, metavar="IMAGES", help="first images of data.train (default: 4000)")
    c = add("step", "step time and memory under each plan of CONFIG, compared with its dense baseline and timm, interleaved")
    c.add_argument(
        "--against", metavar="CONFIG", help="compare with this configuration's final plan (default: CONFIG, all dense)"
    )
    c.add_argument("--pairs", type=int, default=30, help="number of rounds over all rows (default: 30)")
    c = add(
        "study",
        "step time of each arm of a study under each plan of its schedule, interleaved: the times of its page",
        config=False,
    )
    c.add_argument("file", metavar="FILE", help="configs/studies/NAME.yaml")
    c.add_argument("--arms", metavar="A,B,...", help="only these arms (default: all)")
    c.add_argument("--rounds", type=int, default=30, help="number of rounds over all rows (default: 30)")
    c = add(
        "inference", "images/s of forward passes at one density, compared with timm's dense model, EViT and ToMe, interleaved"
    )
    c.add_argument("--density", type=float, default=0.45, help="share of the tokens that stays (default: .45)")
    c.add_argument(
        "--forms",
        metavar="dense,compact,block,bsr,onnx,onnx_int8",
        help="instead: pruned weights of CONFIG, or of the run directory in its place with its top-1, in these forms; every token kept",
    )
    c.add_argument(
        "--against", metavar="timm:NAME", help="with --forms: the network that speedups refer to (default: the dense one)"
    )
    c.add_argument("--batches", metavar="1,32,256", help="batch sizes (default: 1,32,256; on a CPU 1,8)")
    c.add_argument("--rounds", type=int, default=20, help="number of rounds over all rows (default: 20)")
    c = add(
        "engine",
        "step time of DDP and ZeRO 0 to 3 compared with a bare PyTorch loop, on every device of this machine, interleaved",
    )
    c.add_argument("--images-per-device", metavar="256,32", help="batch sizes to measure (default: 256,32; on a CPU 8,2)")
    c.add_argument("--processes", type=int, help="number of processes (default: one per GPU; on a CPU 2)")
    c.add_argument("--rounds", type=int, default=20, help="number of rounds over all rows (default: 20)")
    c.add_argument("--rows", metavar="ddp,zero1,...", help="only these rows, besides the bare loop")
    c = add(
        "gpu-counts",
        "kernels, bytes and products of a training step as torch.compile would run it on an H200, and the time they predict; needs no GPU",
    )
    c.add_argument("--rows", metavar="dense;tokens 0.7;...", help="only these rows, besides dense")
    c = add(
        "journal",
        "time of a logging step with the MLflow server stopped, unresponsive and running; memory of journal and shipper",
        config=False,
    )
    c.add_argument("--lines", type=int, default=2000, help="log lines per server state (default: 2000)")
    c.add_argument("--pause", type=float, default=0.02, metavar="S", help="pause between two lines (default: .02)")
    c = add("checkpoint", "how long a save blocks training, how long writing takes, and their share of a run")
    c.add_argument("--saves", type=int, default=5, help="measured saves, after one warm-up (default: 5)")
    c.add_argument(
        "--examples", type=int, default=1_281_167, help="number of examples whose statistics are saved (default: 1,281,167)"
    )


def _add_loader(part: argparse.ArgumentParser, passes: str) -> None:
    part.add_argument("--workers", type=int, default=2, help="worker processes per loader (default: 2)")
    part.add_argument("--batch", type=int, default=50, help="batch size (default: 50)")
    part.add_argument("--passes", type=int, default=5, help=f"measured {passes}, after one warm-up (default: 5)")
