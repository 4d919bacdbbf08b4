"""Mass thresholds of a set of weights, from `trilevel calibrate`: which mass keeps which mean density (see `sparsity.tokens.mass`).

Kept as RUN/thresholds.json beside a run's weights, or in the header of a weights file. They hold for these weights, pruning block and
score alone, and are refused for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsity.adaptive import AdaptiveViT
from sparsity.tokens.mass import Threshold
from trainer.config.errors import ConfigError
from trainer.storage.disk import atomic_write

FILE, HEADER = "thresholds.json", "thresholds"


@dataclass(frozen=True)
class Thresholds:
    """weights: hash of the weights. block: P. importance: name of the score; "default" in thresholds stored before 2026-11-22. least:
    patches that every image keeps. images: training images of the calibration. by_density: wanted mean density -> Threshold. precision:
    in which their importance was computed, "" if not recorded; in another precision the mean density differs in its third digit."""

    weights: str
    block: int
    importance: str
    least: int
    images: int
    by_density: Mapping[float, Threshold] = field(default_factory=dict)
    precision: str = ""

    def mass(self, density: float) -> float:
        """The threshold for a mean density. Raises ConfigError for one that was not calibrated."""
        if density == 1.0:
            return 1.0
        if density not in self.by_density:
            known = ", ".join(map(repr, sorted(self.by_density))) or "none"
            raise ConfigError(
                f"density {density!r} has no mass threshold; calibrated: {known}. Run trilevel calibrate MODEL --density {density!r}"
            )
        return self.by_density[density].mass

    def to_json(self) -> str:
        return json.dumps(
            asdict(self) | {"by_density": {repr(d): list(t) for d, t in sorted(self.by_density.items())}}, indent=1
        )

    @classmethod
    def of_json(cls, text: str, source: str) -> Thresholds:
        """Raises ConfigError for a text that is not `to_json`'s."""
        try:
            raw = json.loads(text)
            table = {float(density): Threshold(float(mass), float(kept)) for density, (mass, kept) in raw["by_density"].items()}
            numbers = {key: int(raw[key]) for key in ("block", "least", "images")}
            if not all(0 < density <= 1 and 0 < one.mass <= 1 for density, one in table.items()):
                raise ValueError("a threshold outside (0, 1]")
            if min(numbers["block"], numbers["least"] - 1, numbers["images"]) < 0:
                raise ValueError("a negative number")
            return cls(
                weights=str(raw["weights"]),
                importance=str(raw["importance"]),
                by_density=table,
                precision=str(raw.get("precision", "")),
                **numbers,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{source}: no mass thresholds in it ({error}); run trilevel calibrate again") from error

    def refuse_other(self, weights: str, adaptive: AdaptiveViT, source: str) -> None:
        """Raises ConfigError where the thresholds are those of other weights, another pruning block or another score. weights: hash of
        those of `adaptive`."""
        model = adaptive.model
        score = model.about.default_before()[1] if self.importance == "default" else self.importance
        for name, ours, theirs in (
            ("weights", weights, self.weights),
            ("tokens.blocks", adaptive.block, self.block),
            ("tokens.importance", model.importance, score),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"{source}: calibrated for {name} {theirs}, this model has {ours}; run trilevel calibrate again"
                )


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Hash over names, shapes and bytes of weights by timm's names, whatever file they come from."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        tensor = value.detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def read(source: Path) -> Thresholds | None:
    """The thresholds of a run directory or a weights file; None if it has none. Raises ConfigError if they can't be read."""
    path = source / FILE if source.is_dir() else source
    if source.is_dir():
        return Thresholds.of_json(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else None
    if path.suffix != ".safetensors":
        return None
    text = header(path).get(HEADER)
    return None if text is None else Thresholds.of_json(text, str(path))


def write_to_run(run: Path, thresholds: Thresholds) -> Path:
    """RUN/thresholds.json, atomically."""
    with atomic_write(run / FILE) as file:
        file.write(thresholds.to_json().encode() + b"\n")
    return run / FILE


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a safetensors file ({error}); export it again") from error
