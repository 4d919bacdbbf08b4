"""Arguments of the commands around data sets: pack, init, index, verify."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from trainer.cli.shared_arguments import add_command, add_pipe


def add_data_commands(commands: Any) -> None:
    """Shards: made, indexed, checked."""
    add = partial(add_command, commands)
    c = add("pack", "pack images into webdataset shards with an index")
    c.add_argument(
        "source",
        metavar="SRC",
        help="a folder or tar: class folders, Tiny-ImageNet, CIFAR, ILSVRC, parquet ..., or sklearn:digits",
    )
    c.add_argument("destination", metavar="DST")
    c.add_argument(
        "--labels",
        metavar="FILE",
        help="labels of images without class folders; column:NAME of a table; json:FIELD of webdataset tars",
    )
    c.add_argument(
        "--layout",
        metavar="NAME",
        help="the layout of SRC, if several fit (default: recognised): tiny_imagenet, cifar, ilsvrc, kaggle_ilsvrc, "
        "hugging_face_parquet, hugging_face_folder, webdataset, class_tars, class_folders, inner_folders, flat_files",
    )
    c.add_argument("--name", help="name of the split if the source has no splits (default: train)")
    c.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="of a source without splits: this share of each class becomes `validation`",
    )
    c.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default: 0)")
    c.add_argument("--shard-size", type=float, default=128, metavar="MIB", help="bytes of images per shard (default: 128 MiB)")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument(
        "--short-side", type=int, metavar="PX", help="resize images to this short side; changes pixels, which runs record"
    )
    c.add_argument("--quality", type=int, help="JPEG quality of resized images (default: 90)")

    c = add(
        "init", "look at packed shards or class folders and write a commented configuration for them, and its dense baseline"
    )
    c.add_argument(
        "folder",
        metavar="DATA",
        help="packed or indexed shards, e.g. shards/NAME, or class folders: DATA/train/CLASS/, DATA/val/CLASS/",
    )
    c.add_argument("--out", metavar="FILE.yaml", help="default: NAME.yaml, with NAME_dense.yaml beside it")
    c.add_argument(
        "--epochs", type=int, metavar="N", help="length of the runs; warm-up and schedules follow (default: by images)"
    )

    c = add("index", "index existing webdataset shards, local or remote, in one parallel pass")
    c.add_argument("shards", metavar="SHARDS", help="path, glob or brace pattern; http(s)://, s3://, gs:// or hf:// pattern")
    c.add_argument("--labels", default="cls", help="cls, json:FIELD, key or file:PATH (default: cls)")
    c.add_argument("--workers", type=int, default=8)
    _add_storage(c)

    c = add("verify", "decode every image of indexed shards and list the broken ones (exit code 1 if there are any)")
    c.add_argument("shards", metavar="SHARDS")
    c.add_argument("--labels", default="cls")
    c.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    c.add_argument("--json", metavar="FILE")
    _add_storage(c)


def _add_storage(command: argparse.ArgumentParser) -> None:
    command.add_argument("--index", metavar="DIR", help="folder of the index, same as data.index (default: beside the shards)")
    command.add_argument(
        "--cache", metavar="DIR", help="cache of remote shards, same as data.cache (default: ~/.cache/trilevel)"
    )
    command.add_argument("--cache-size", type=float, default=64.0, metavar="GIB", help="same as data.cache_size (default: 64)")
    add_pipe(command)
