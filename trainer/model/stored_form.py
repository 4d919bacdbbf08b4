"""The form of pruned weights in a file of `trilevel export`: what its header says, and dense weights from it.

`bytes`: see `stored.sizes`; `blocks` {layer: [O, I, p, q, axis]}, kept groups with their indices; `compact` {module: units or heads},
layers of sizes that plain timm cannot build. MLPs that are all of one size need neither: `args` has their `mlp_ratio`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsity.weights import compact, stored
from sparsity.weights.groups import Block
from trainer.config.errors import ConfigError
from trainer.storage.memory_limit import memory_limit

COMPACT, BLOCKS, SIZES = "compact", "blocks", "bytes"  # keys of the header
GROWTH, SPARE = 64, 1 << 30  # memory for a file of n bytes: 64 n (blocks of a 20th, unpacked, and a copy) and 1 GiB


def read(state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of a file by timm's names: blocks are unpacked, 0 where groups are pruned. Raises ValueError for damaged ones."""
    found = dict(state)
    for name, numbers in json.loads(header.get(BLOCKS, "{}")).items():
        if not (isinstance(numbers, list) and len(numbers) == 5 and all(type(n) is int and n >= 0 for n in numbers)):
            raise ValueError(f"{BLOCKS} of {name}: {numbers!r:.80} must be [outputs, inputs, rows, columns, axis]")
        outputs, inputs, p, q, axis = numbers
        if min(outputs, inputs, p, q) < 1 or axis > 1:
            raise ValueError(f"{BLOCKS} of {name}: {numbers}: sizes must be >= 1, the axis 0 or 1")
        site = Block(name, outputs, inputs, (p, q), axis)
        try:
            parts = {part: found.pop(f"{site.weight}.{part}") for part in stored.PARTS}
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        found[site.weight] = stored.unpacked(site, parts)
    return found


def shrink(vit: Any, header: Mapping[str, str]) -> None:
    """Give a new network the layers of a compact file. Raises ValueError for sizes that it cannot have."""
    compact.shrink(vit, {name: int(size) for name, size in json.loads(header.get(COMPACT, "{}")).items()})


def described(header: Mapping[str, str]) -> str:
    """What of a file plain timm cannot build; "" for a file that it can."""
    if BLOCKS in header:
        sizes = json.loads(header[SIZES])
        return (
            f"{len(json.loads(header[BLOCKS]))} layers as blocks: {sizes['block']:,} bytes, {sizes['dense']:,} dense, "
            f"{sizes['csr']:,} as CSR"
        )
    if COMPACT in header:
        smaller = json.loads(header[COMPACT])
        return f"smaller layers: {', '.join(f'{name} {size}' for name, size in smaller.items())}"
    return ""


def changes_importance(header: Mapping[str, str]) -> bool:
    """Whether the file lacks heads: the importance of tokens is a mean over heads, in which the pruned ones were flat, so thresholds of its
    mass are no longer right."""
    return any(name.endswith(".attn") for name in json.loads(header.get(COMPACT, "{}")))


def started_from(
    state: Mapping[str, Tensor], header: Mapping[str, str], path: Path, key: str, args: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The weights of a file that another run starts from, by timm's names and in timm's shapes; blocks are unpacked, 0 where groups are
    pruned. key: of the configuration, as model.init or teacher.from; args: of its network. Raises ConfigError for smaller layers than the
    network's, and for damaged files."""
    if not {"model", "args", SIZES} <= header.keys():
        return dict(state)
    what = f"{key}={path}: written by export --compact"
    remedy = "export the run without --compact, or give its directory"
    if COMPACT in header:
        raise ConfigError(f"{what}, with layers of other sizes or fewer heads than timm builds; {remedy}")
    with naming(path):
        theirs = json.loads(header["args"])
        other = theirs.get("mlp_ratio") != args.get("mlp_ratio") and BLOCKS not in header
        dense = read(state, header)
    if other:
        raise ConfigError(
            f"{what}, which cut pruned units out; set {key.partition('.')[0]}.args='{json.dumps(theirs)}', or {remedy}"
        )
    return dense


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a damaged or forged header leads to becomes a ConfigError with the file and the remedy: wrong values, and a network that is out
    of proportion to the weights in the file."""
    allowed = GROWTH * path.stat().st_size + SPARE
    try:
        with memory_limit(allowed):
            yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: the header does not describe a network: {error}; export it again") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ConfigError(
            f"{path}: the network of the header needs more than {allowed / 2**30:.1f} GiB, the file has {path.stat().st_size:,} bytes; "
            "export it again"
        ) from error
