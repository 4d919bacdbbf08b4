"""What stands below the table of `trilevel eval`: where its rows are not what their numbers seem to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sparsity.network import SparseNetwork
from sparsity.tokens.mass import TOLERANCE
from trainer.analysis.evaluation.precision import Computed
from trainer.model.thresholds import Thresholds


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
