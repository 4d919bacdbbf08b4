"""Mass-based selection: the fewest patches that hold a mass, and thresholds for a wanted mean density."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.tokens import mass


def importances(images: int, patches: int, seed: int = 0, sharpness: float = 3.0) -> torch.Tensor:
    """Rows that sum to 1, from flat to sharp."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, sharpness, images)[:, None]
    return (torch.randn(images, patches, generator=g) * scale).softmax(dim=1)


@given(seed=st.integers(0, 50), threshold=st.floats(0.01, 0.999))
@example(seed=26, threshold=0.9751981589717296)  # in float32 it equals a mass, in float64 it is above
def test_the_count_is_minimal(seed, threshold):
    ranked = mass.rank(importances(16, 49, seed))
    for row, count in zip(ranked.mass, mass.counts(ranked.mass, threshold, least=1).tolist(), strict=True):
        assert float(row[count - 1]) >= threshold or count == 49  # a sum of 49 shares may stay below 1 by rounding
        assert count == 1 or float(row[count - 2]) < threshold


def test_a_mass_of_one_keeps_all_and_the_least_holds():
    flat, sharp = torch.full((1, 64), 1 / 64), torch.zeros(1, 64)
    sharp[0, 7] = 1.0
    ranked = mass.rank(torch.cat((flat, sharp)))
    assert mass.counts(ranked.mass, 1.0).tolist() == [64, 64]  # the sharp row's sum reaches 1 at its first patch
    assert mass.counts(ranked.mass, 0.5).tolist() == [32, 16]
    assert mass.counts(ranked.mass, 0.5, least=1).tolist() == [32, 1]
    assert mass.counts(mass.rank(torch.full((1, 9), 1 / 9)).mass, 0.01).tolist() == [9]  # fewer patches than the least
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"mass={wrong:g}: must be in \(0, 1\]"):
            mass.counts(ranked.mass, wrong)


def test_ties_go_to_the_lower_position():
    ranked = mass.rank(torch.tensor([[0.25, 0.125, 0.25, 0.125, 0.25]]))
    assert ranked.order.tolist() == [[0, 2, 4, 1, 3]]
    assert ranked.mass.tolist() == [[0.25, 0.5, 0.75, 0.875, 1.0]]


@pytest.mark.parametrize("density", [0.35, 0.5, 0.7, 0.999])
def test_a_threshold_keeps_the_wanted_mean_density(density):
    ranked = mass.rank(importances(500, 196))
    found = mass.threshold_for(ranked.mass, density)
    kept = float(mass.counts(ranked.mass, found.mass).double().mean()) / 196
    assert found.density == kept == pytest.approx(density, abs=1e-3)  # 500 x 196 patches: a step of the mean is 1e-5 to 1e-3


@pytest.mark.parametrize("density", [0.35, 0.5, 0.7, 0.9])
def test_a_sharp_importance_has_thresholds_too(density):
    """Each patch a share of .5 to .25 of the one before: sums in float32 reach 1 at the 12th to 24th of them."""
    rows = mass.rank((torch.linspace(-0.7, -1.4, 400)[:, None] * torch.arange(24.0)).softmax(dim=1))
    found = mass.threshold_for(rows.mass, density, least=1)
    assert found.density == pytest.approx(density, abs=mass.TOLERANCE)
    assert 24 * found.density == pytest.approx(float(mass.counts(rows.mass, found.mass, least=1).double().mean()))


def test_a_density_that_no_threshold_reaches_is_refused():
    zeros = torch.zeros(10, 64)
    zeros[:, 3] = 1.0  # all importance on one patch: 16 tokens, or all
    with pytest.raises(
        ValueError, match=r"density=0.5: no mass keeps it within 0.02, the nearest keep 0.25 and 1 of the tokens"
    ):
        mass.threshold_for(mass.rank(zeros).mass, 0.5)


def test_a_jump_of_the_mean_takes_the_nearer_side():
    same = mass.rank(torch.full((10, 20), 0.05)).mass  # all images alike: the mean density moves in steps of 1/20
    assert mass.threshold_for(same, 0.86, least=1).density == pytest.approx(0.85)
    assert mass.threshold_for(same, 0.89, least=1).density == pytest.approx(0.9)
    assert mass.threshold_for(same, 1.0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("density", "message"),
    [(0.0, "must be in"), (1.1, "must be in"), (0.05, r"less than the 16 that every image keeps; use at least 0.25")],
)
def test_densities_that_cannot_be_are_refused(density, message):
    with pytest.raises(ValueError, match=message):
        mass.threshold_for(mass.rank(importances(4, 64)).mass, density)
