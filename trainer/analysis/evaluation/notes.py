"""What stands below the table of `trilevel eval`: where its rows are not what their numbers seem to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sparsity.network import SparseNetwork
from sparsity.tokens.mass import TOLERANCE
from trainer.analysis.evaluation.precision import Computed
from trainer.config.run_config import Config
from trainer.data.shards.index import Index
from trainer.data.shards.one_based import numbered
from trainer.journal.reader import FILE, read
from trainer.model.origin import Origin
from trainer.model.thresholds import Thresholds


def origin_notes(of: Origin, config: Config, network: SparseNetwork, densities: Iterable[float]) -> Iterator[str]:
    """Settings of `config` under which the weights were not trained. densities: keep ratios of tokens of the rows."""
    if different := of.other_pixels(config.augment):
        yield f"other pixels: these weights were {different}; scores are lower than with their own"
    for key, own, now in of.other_tokens(config, network) if of.tokens.get("method") != "all" else ():
        yield f"other tokens: these weights were trained with tokens.{key}={own}, this configuration has {now}"
    low, high = (min(of.densities), max(of.densities)) if of.densities else (0.0, 1.0)
    if outside := [f"{density:g}" for density in densities if not low <= density <= high]:
        trained = f"{low:g} to {high:g}" if low < high else f"{low:g} alone"
        yield f"density {', '.join(outside)}: outside of those in training, {trained}"


def class_notes(source: Path | None, index: Index) -> Iterator[str]:
    """Whether the images have other class names than those of the run directory `source`: labels are compared by number."""
    if source is None or not (source / FILE).is_file():
        return
    trained: list[str] = next((line.get("classes") or [] for line in read(source) if line["kind"] == "start"), [])
    if not trained or trained == index.classes or (numbered(index) and trained == [str(i) for i in range(len(trained))]):
        return
    label = next((i for i, pair in enumerate(zip(trained, index.classes, strict=False)) if pair[0] != pair[1]), None)
    where = "" if label is None else f"; class {label} is {trained[label]!r} in the run and {index.classes[label]!r} here"
    yield (
        f"other classes: the run has {len(trained)}, these images {len(index.classes)}{where}. Scores compare class numbers; pack the "
        "images into a folder with the run's classes.txt"
    )


def mass_notes(
    thresholds: Thresholds, computed: Computed, network: SparseNetwork, found: Iterable[tuple[float, float]]
) -> Iterator[str]:
    """found: (wanted mean density, mean tokens with prefix) of each adaptive row."""
    if thresholds.precision not in ("", computed.name):
        yield f"mass: thresholds were found in {thresholds.precision}, these passes are {computed.name}"
    height, width = network.grid
    for density, tokens in found:
        kept = (tokens - network.network.num_prefix_tokens) / (height * width)
        if abs(kept - density) > TOLERANCE:
            yield (
                f"mass {density:g}: these images keep {kept:.2f} of the patches on average; the threshold was found with "
                f"{thresholds.images} training images, calibrate with more, or with images like these"
            )
