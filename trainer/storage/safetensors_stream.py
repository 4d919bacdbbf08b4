"""A safetensors file piece by piece, without copying tensors: the library's own `save` makes two more copies in memory and holds
the GIL meanwhile, which would block training during a save in the background."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Header and data of a safetensors file; the tensors are on the CPU. Raises ValueError for an unsupported dtype."""
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # widest dtype first, so that all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in WORDS:
            raise ValueError(f"{name}: safetensors does not support {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
