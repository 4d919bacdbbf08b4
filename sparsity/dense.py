"""Any other classifier of timm, computed whole: ConvNeXt, ResNet, EfficientNet, MaxViT, EVA, ... Level 1 leaves out whole
examples and needs nothing but logits, so it works with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from sparsity import drop_path
from sparsity.graph_cost import shape_of_logits, traced
from sparsity.network import NOTHING_LEFT_OUT, Cost, Levels, SparseNetwork
from sparsity.types import DENSE, ModelOutput, Plan

TRACED = 2  # images: with one, a part of an image and an image could not be told apart


class Dense(SparseNetwork):
    """`network` as it is, but with drop path keyed by image. image_size: side of its images in pixels, which its cost is counted for.

    Raises ValueError for a network without logits (B, classes), or whose drop path acts on parts of images.
    """

    models = "any classifier of timm"

    def __init__(self, network: nn.Module, image_size: int) -> None:
        super().__init__(network)
        self._paths = drop_path.replaced(network)
        self._total = self._examined(image_size)
        self._calls = sum(path.calls for path in self._paths)

    @classmethod
    def why_not(cls, network: nn.Module) -> str:
        return ""

    @classmethod
    def of(cls, network: nn.Module, levels: Levels) -> Self:
        return cls(network, levels.image_size or image_size_of(network))

    def forward(
        self, images: Tensor, plan: Plan = DENSE, outputs: frozenset[str] = frozenset(), rng_keys: Tensor | None = None
    ) -> ModelOutput:
        if outputs:
            raise ValueError(f"outputs={', '.join(sorted(outputs))}: {type(self.network).__name__} gives logits only")
        if self._paths and self.training:
            drop_path.set_drawn(self._paths, rng_keys, self._calls)
        return ModelOutput(self.network(images))

    def cost(self, plan: Plan = DENSE, left: Mapping[str, float] = NOTHING_LEFT_OUT) -> Cost:
        return Cost(self._total, (self._total,), (), 0)

    def _examined(self, size: int) -> int:
        """Multiply-adds of an image, counted here once: under ZeRO 3 the weights are partitioned later. Counts the calls of each drop path
        too."""
        shapes: dict[nn.Module, list[tuple[int, ...]]] = {path: [] for path in self._paths}
        hooks = [path.register_forward_pre_hook(lambda m, given: shapes[m].append(given[0].shape)) for path in self._paths]
        name, was_training = type(self.network).__name__, self.network.training
        try:
            multiply_adds, output = traced(self.network.eval(), size, size, images=TRACED)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{name} with these arguments does not take images of {size} x {size} pixels: {reason}; choose another size or "
                "arguments"
            ) from error
        finally:
            self.network.train(was_training)
            for hook in hooks:
                hook.remove()
        if len(shape_of_logits(output)) != 2 or len(output) != TRACED:
            raise ValueError(f"{name} is not a classifier: its output is not one row of logits per image")
        for path in self._paths:
            path.calls = max(len(shapes[path]), 1)
            if any(shape[0] != TRACED for shape in shapes[path]):
                raise ValueError(
                    f"the drop path of a {name} acts on parts of images, so it cannot be keyed by example; set model.drop_path=0"
                )
        return multiply_adds


def image_size_of(network: Any) -> int:
    """The side of the images that a network was built for, or that timm's weights were trained with."""
    built = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(built[0] if built else network.pretrained_cfg["input_size"][-1])
