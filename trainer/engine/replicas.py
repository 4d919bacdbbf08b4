"""Compares what every rank has a whole copy of, the weights and their moving average, to the bit: a flipped bit in one device's memory
would make the ranks train different networks from there on, without an error.

One pass over the memory of the weights and a gather of one number per rank, at every evaluation and checkpoint. Under ZeRO 3 the
parameters are partitioned, so no rank has a second copy to compare: nothing is checked there. Under ZeRO 1 and 2 the partitions of the
optimizer (master weights, moments) exist once too, and each step copies its result to all ranks: a flipped bit in a partition spreads to
all and is not noticed.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.engine.errors import EngineError
from trainer.engine.processes import Processes

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed number: products wrap around at 2^64
SHOWN = 8


def digests(tensors: Mapping[str, Tensor]) -> Tensor:
    """One int64 per tensor, (len(tensors),): the sum of its elements' bits as integers. One flipped bit changes it by a power of two."""
    sums = []
    for value in tensors.values():
        bits = value.detach().contiguous().view(-1)
        bits = bits.view(_INTEGERS[bits.element_size()]) if bits.dtype != torch.bool else bits
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums)


def digest(sums: Tensor) -> Tensor:
    """One int64, (1,): the digests times powers of an odd number, modulo 2^64, so that the tensor that differs and its place count."""
    factors, factor = [], 1
    for _ in range(len(sums)):
        factor = (factor * _FACTOR + 2**63) % 2**64 - 2**63 | 1
        factors.append(factor)
    return (sums * torch.tensor(factors, dtype=torch.int64, device=sums.device)).sum(dtype=torch.int64)[None]


def assert_replicas_equal(ranks: Processes, tensors: Mapping[str, Tensor], step: int) -> None:
    """Collective. Raises EngineError on all ranks if the tensors, of equal names and shapes, are not equal to the bit on all of them."""
    if ranks.world == 1 or not tensors:
        return
    sums = digests(tensors)
    found = ranks.all_gather(digest(sums)).tolist()
    if len(set(found)) == 1:
        return
    table = torch.stack(ranks.all_gather(sums[None]).unbind()).cpu()  # (world, tensors)
    hosts = ranks.all_gather_objects([socket.gethostname()])
    raise EngineError(describe(found, table, list(tensors), hosts, step))


def describe(found: list[int], table: Tensor, names: list[str], hosts: list[str], step: int) -> str:
    """Which ranks differ from the majority, in what, and what to do. found: digest of each rank; table: (rank, tensor) of its sums."""
    (common, count), *rest = Counter(found).most_common()
    differs = [names[i] for i in (table != table[0]).any(dim=0).nonzero().flatten().tolist()]
    what = f"{len(differs)} of {len(names)} tensors, first {differs[0]}" if differs else "unknown tensors"
    if rest[0][1] == count:
        groups = [[rank for rank, one in enumerate(found) if one == value] for value, _ in [(common, count), *rest]]
        who = " and ".join(f"rank{'s' * (len(g) > 1)} {_listed(g)}" for g in groups[:SHOWN]) + " have different weights"
        suspects = hosts
    else:
        odd = [rank for rank, one in enumerate(found) if one != common]
        who = f"rank{'s' * (len(odd) > 1)} {_listed(odd)} of {len(found)} differ{'s' * (len(odd) == 1)} from the majority"
        suspects = [hosts[rank] for rank in odd]
    where = ", ".join(sorted(set(suspects))[:SHOWN])
    return (
        f"replicas differ at step {step}: {who} ({what}); a flipped bit, or devices that compute differently. Check the device memory "
        f"of {where} (nvidia-smi -q -d ECC, dmesg), leave a faulty one out, and continue with --resume from the last checkpoint, "
        "which was compared before it was written"
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
