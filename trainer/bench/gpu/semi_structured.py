"""`make gpu PART=sparse`: 2:4 weights beside dense ones in bf16, at the shapes of DeiT-S and in the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsity.weights.magnitude import MagnitudeSettings
from trainer.bench.gpu.facts import IMAGES, LENGTHS, SHAPES, timed
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.bench.semi_structured import InBf16, converted, semi_structured, stored_bytes

ALLOWED = 0.02  # of the largest number: bf16 keeps 8 bits, and both sides round sums of up to 1536 products


def part(host: Host) -> Iterator[Row]:
    """Weights with the two largest of every four; times of the same product, dense with its zeros and 2:4."""
    tokens = (8 if host.tiny else IMAGES) * LENGTHS[0]
    for name, (inside, outside) in SHAPES.items():
        yield f"2:4 product, {name} of {tokens} tokens", lambda i=inside, o=outside: _product(host, tokens, i, o)
    for images in (2,) if host.tiny else (1, 32, IMAGES):
        yield f"2:4 DeiT-S, {images} images", lambda images=images: _network(host, images)


def packed_and_back(weight: Tensor) -> Tensor:
    """A weight (O, I) in torch's 2:4 form, unpacked again: on a CPU, which has no products of it. What is no 2:4 pattern comes back as
    other numbers."""
    return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))


def _convert(host: Host) -> Callable[[Tensor], Tensor]:
    return to_sparse_semi_structured if host.on_gpu else packed_and_back


@torch.inference_mode()
def _product(host: Host, tokens: int, inside: int, outside: int) -> Facts:
    x, weight = (torch.randn(shape, device=host.device).to(torch.bfloat16) for shape in ((tokens, inside), (outside, inside)))
    kept = torch.zeros(weight.numel() // 4, 4, device=host.device).scatter_(
        1, weight.abs().view(-1, 4).float().topk(2).indices, 1.0
    )
    weight = weight * kept.view_as(weight).to(weight.dtype)
    sparse = converted(weight, _convert(host))
    return _compared(host, lambda: F.linear(x, weight), lambda: F.linear(x, sparse)) | {
        "bytes": stored_bytes(sparse),
        "dense_bytes": stored_bytes(weight),
    }


@torch.inference_mode()
def _network(host: Host, images: int) -> Facts:
    small: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4} if host.tiny else {}
    vit: Any = timm.create_model("deit_small_patch16_224", **small).eval()
    level = MagnitudeSettings(keep=0.5, block=(1, 4), prune=0.0).build(vit)
    level.begin_epoch(0, lambda: dict(vit.named_parameters()))
    for name, mask in level.masks().items():
        vit.get_parameter(name).mul_(mask)
    vit.get_parameter("head.weight").normal_()  # zeros in timm: the logits would be equal
    sparse, size = semi_structured(vit, level, host.device, _convert(host))
    dense = InBf16(vit.to(host.device, torch.bfloat16))
    pixels = torch.randn(images, 3, *vit.patch_embed.img_size, device=host.device)
    return _compared(host, lambda: dense(pixels), lambda: sparse(pixels)) | {"bytes": size}


def _compared(host: Host, dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Facts:
    right, found = dense().float(), sparse().float()
    difference = float((right - found).abs().max() / right.abs().max())
    times = 1 if host.tiny else 20
    seconds = [timed(one, host.device, times) for one in (dense, sparse)]
    facts: Facts = {"ok": difference <= ALLOWED, "difference": difference, "allowed": ALLOWED}
    return facts | {"dense_ms": 1000 * seconds[0], "sparse_ms": 1000 * seconds[1], "speedup": seconds[0] / seconds[1]}
