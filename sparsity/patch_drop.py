"""timm's patch drop (`patch_drop_rate`, in training): a random share of the patches never enters the blocks. Letters as in `types`."""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import PatchDropout
from timm.layers.patch_dropout import patch_dropout_forward
from torch import Tensor, nn

from sparsity import keyed_random
from sparsity.attention import gather_tokens
from sparsity.tokens import scores

SALT = 0x70617463


def dropped(drop: nn.Module, x: Tensor, num_prefix: int, rng_keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of x (B, P + n, D) that stay, prefix tokens always, and the ids of the patches among them, (B, k) int64.

    rng_keys: (B,) int64, the key of each image, which its draw then follows; None: timm's own draw, from the global generator.
    """
    ids = torch.arange(x.shape[1] - num_prefix, device=x.device).expand(x.shape[0], -1)
    if not (isinstance(drop, PatchDropout) and drop.training and drop.prob > 0):
        return x, ids
    if rng_keys is None:
        x, index = patch_dropout_forward(x, drop.prob, num_prefix, drop.ordered, True)
        return x, cast(Tensor, index)
    num_kept = max(1, int(ids.shape[1] * (1.0 - drop.prob)))
    index = scores.ranked(keyed_random.uniform(rng_keys, SALT, shape=(ids.shape[1],)))[:, :num_kept]
    ids = index.sort(dim=1).values if drop.ordered else index
    return torch.cat((x[:, :num_prefix], gather_tokens(x[:, num_prefix:], ids, 1)), dim=1), ids
