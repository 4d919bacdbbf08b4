"""Level 4: the penalties against float64 references written here, and against optima that are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsity.settings import SettingsError
from sparsity.weights import WEIGHTS
from sparsity.weights.admm import Admm, AdmmSettings, pulled_to
from sparsity.weights.group_lasso import GroupLasso, GroupLassoSettings, penalty, reweight, shrunk
from sparsity.weights.groups import Block
from sparsity.weights.magnitude import Magnitude, MagnitudeSettings
from sparsity.weights.pruning import PenaltySettings, Pruning, due
from tests.sparsity.weights.test_groups import drawn, reference
from tests.support.vits import tiny

SITE = Block("fc", 6, 10, (4, 4))
LR = 0.1


def settings(kind, **more):
    return kind(**{"keep": 0.5, "block": (4, 4), "prune": 9.0} | more)


def descended(
    level: Pruning, aim: torch.Tensor, epochs: int, steps: int = 40, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient steps on ||W - aim||^2 / 2, each followed by the penalty's, as the trainer does."""
    weight = aim.clone() if weight is None else weight
    for epoch in range(epochs):
        level.begin_epoch(epoch, lambda now=weight: {"fc.weight": now})
        for _ in range(steps):
            moved = weight - LR * (weight - aim)
            weight = level.pulled("fc.weight", moved.flatten(), 0, LR).view_as(weight)
    return weight


def test_reweighting_is_the_formula():
    weight = drawn(6, 10).numpy()
    energy, counts = SITE.energy({"fc.weight": torch.from_numpy(weight)}), SITE.counts()
    beta = reweight(energy, counts, eps=0.01)
    wanted = np.zeros(beta.shape)
    number = 0
    for rows in ((0, 4), (4, 6)):
        for columns in ((0, 4), (4, 8), (8, 10)):
            block = weight[slice(*rows), slice(*columns)]
            for c in range(block.shape[1]):
                wanted[number, c] = (weight**2).mean() / ((block[:, c] ** 2).mean() + 0.01 * (weight**2).mean())
            number += 1
    np.testing.assert_allclose(beta.numpy(), wanted, rtol=1e-12)
    assert float(penalty(energy, beta)) == pytest.approx(float((energy * torch.from_numpy(wanted)).sum()), rel=1e-12)
    assert reweight(torch.zeros(2, 4), torch.ones(2, 4).long(), 0.01).isfinite().all(), "a layer of zeros"


def test_the_steps_minimise_what_they_promise():
    """Against a search over numbers: the proximal steps are the minima of their definitions."""
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    for value, beta, target in ((1.3, 4.0, 0.2), (-0.7, 0.5, -0.9)):
        lasso = 0.5 * (grid - value) ** 2 + LR * 0.3 * beta * grid**2
        assert float(shrunk(torch.tensor(value), torch.tensor(beta), 0.3, LR)) == pytest.approx(
            float(grid[lasso.argmin()]), abs=1e-5
        )
        pull = 0.5 * (grid - value) ** 2 + LR * 3.0 / 2 * (grid - target) ** 2
        assert float(pulled_to(torch.tensor(value), torch.tensor(target), 3.0, LR)) == pytest.approx(
            float(grid[pull.argmin()]), abs=1e-5
        )


def test_group_lasso_reaches_the_optimum_of_a_convex_case():
    """Without reweighting after the start, min ||W - A||^2 / 2 + lambda sum beta ||W_g||^2 is W = A / (1 + 2 lambda beta)."""
    aim = drawn(6, 10)
    level = GroupLasso(settings(GroupLassoSettings, every=100.0, prune=200.0, strength=0.4), [SITE])
    found = descended(level, aim, epochs=10)
    beta = SITE.spread(reweight(SITE.energy({"fc.weight": aim}), SITE.counts(), 0.01))["fc.weight"]
    torch.testing.assert_close(found, aim / (1 + 2 * 0.4 * beta), rtol=1e-10, atol=1e-12)


def test_reweighting_removes_weak_groups_and_spares_strong_ones():
    """Single weights, one block: the limit solves w + 2 lambda m w / (w^2 + eps m) = a, with m of the limit itself."""
    site = Block("fc", 1, 6, (1, 6))
    aim = torch.tensor([[3.0, -2.5, 2.0, 0.3, -0.2, 0.1]], dtype=torch.float64)
    level = GroupLasso(settings(GroupLassoSettings, prune=400.0, strength=0.02), [site])
    found = descended(level, aim, epochs=200)
    mean = found.square().mean()
    back = found + 2 * 0.02 * mean * found / (found.square() + 0.01 * mean)
    torch.testing.assert_close(back, aim, rtol=1e-6, atol=1e-9)
    left = (found / aim).abs()[0]
    assert left[:3].min() > 0.9 and left[3:].max() < 0.6


def test_admm_is_the_textbook_iteration():
    """Z and U after each update, in numpy: Z = P(W + U), U = U + W - Z, from U = 0."""
    aim = drawn(6, 10)
    level, weight = Admm(settings(AdmmSettings, rho=2.0), [SITE]), aim.clone()
    z, u = np.zeros((6, 10)), np.zeros((6, 10))
    for epoch in range(5):
        assert level.begin_epoch(epoch, lambda now=weight: {"fc.weight": now}) == "updated"
        lifted = weight.numpy() + u
        z = lifted * reference(lifted, (4, 4), 0.5, 1)
        u = u + weight.numpy() - z if epoch else u  # from the second update on
        np.testing.assert_allclose(level.copy["fc.weight"].numpy(), z, rtol=1e-12, atol=0)
        np.testing.assert_allclose(level.dual["fc.weight"].numpy(), u, rtol=1e-12, atol=1e-15)
        for _ in range(3):
            moved = weight - LR * (weight - aim)
            by_hand = (moved + LR * 2.0 * torch.from_numpy(z - u)) / (1 + LR * 2.0)
            weight = level.pulled("fc.weight", moved.flatten(), 0, LR).view_as(moved)
            torch.testing.assert_close(weight, by_hand, rtol=1e-12, atol=1e-15)


def test_admm_reaches_the_pruned_optimum_of_a_convex_case():
    """min ||W - A||^2 / 2 over W with two columns per block is P(A): what stays is A, what leaves is pulled to nearly nothing."""
    aim = drawn(6, 10)
    level = Admm(settings(AdmmSettings, rho=1.0, prune=500.0), [SITE])
    found, mask = descended(level, aim, epochs=60), torch.from_numpy(reference(aim.numpy(), (4, 4), 0.5, 1))
    torch.testing.assert_close(found * mask, aim * mask, rtol=1e-6, atol=1e-9)
    assert (found * (1 - mask)).norm() < 1e-6 * aim.norm()
    assert level.begin_epoch(500, lambda: {"fc.weight": found}) == "pruned"
    assert torch.equal(level.masks()["fc.weight"].double(), mask) and not level.moves and not level.copy


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "all"])
def test_phases(name):
    """Dense until `start`, updates from then on, pruned once, masked for good."""
    kind, weight = WEIGHTS[name], drawn(6, 10)
    given = {"prune": 6.0} | ({"start": 2.0, "every": 2.0} if issubclass(kind, PenaltySettings) else {})
    level = settings(kind, **given)._build([SITE])
    events = []
    for epoch in range(9):
        events.append(level.begin_epoch(epoch, lambda: {"fc.weight": weight}))
        pulled = level.pulled("fc.weight", weight.flatten()[3:17], 3, LR)
        assert level.moves == (not torch.equal(pulled, weight.flatten()[3:17]))
        whole = level.pulled("fc.weight", weight.flatten(), 0, LR)
        assert torch.equal(whole[3:17], pulled), "elementwise: a part of a parameter gets what the whole gets"
    penalised = ["updated", "", "updated", ""] if "start" in given else [""] * 4
    assert events == ["", "", *penalised, "pruned", "", ""]
    np.testing.assert_array_equal(level.masks()["fc.weight"].double().numpy(), reference(weight.numpy(), (4, 4), 0.5, 1))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "all"])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_level_is_the_uninterrupted_one(name, stop):
    given = {"prune": 5.0} | ({"start": 1.0, "every": 2.0} if issubclass(WEIGHTS[name], PenaltySettings) else {})
    aim = drawn(6, 10).float()

    def run(level: Pruning, first: int, weight: torch.Tensor, until: int) -> torch.Tensor:
        for epoch in range(first, until):
            level.begin_epoch(epoch, lambda now=weight: {"fc.weight": now})
            for _ in range(4):
                moved = weight - LR * (weight - aim)
                weight = level.pulled("fc.weight", moved.flatten(), 0, LR).view_as(weight)
        return weight

    whole = settings(WEIGHTS[name], **given)._build([SITE])
    wanted = run(whole, 0, aim.clone(), 8)
    before, after = (settings(WEIGHTS[name], **given)._build([SITE]) for _ in range(2))
    halfway = run(before, 0, aim.clone(), stop)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, stop, halfway, 8), wanted)
    assert torch.equal(after.masks()["fc.weight"], whole.masks()["fc.weight"])


def test_masks_of_another_run_are_refused_by_name():
    level = Magnitude(settings(MagnitudeSettings, prune=0.0), [SITE])
    level.begin_epoch(0, lambda: {"fc.weight": drawn(6, 10)})
    other = Magnitude(settings(MagnitudeSettings), [Block("fc", 6, 10, (2, 5))])
    with pytest.raises(ValueError, match=r"masks of another run: groups of fc are \[6, 4\] there, \[6, 5\] here; resume with"):
        other.load_state_dict(level.state_dict())
    other.load_state_dict({})
    assert other.masks() == {} and other.kept is None


def test_keep_one_is_the_identity_and_settings_are_refused_by_key():
    vit = tiny()
    for kind in WEIGHTS.values():
        level = kind().build(vit)
        assert type(level) is Pruning and level.parameters == [] and level.begin_epoch(3, dict) == "" and level.masks() == {}
    for given, words in (
        ({"keep": 0.0}, "weights.keep=0.0: must be > 0 and <= 1"),
        ({"keep": 1.5}, "weights.keep=1.5: must be > 0 and <= 1"),
        ({"block": (0, 4)}, "weights.block=(0, 4): entry 0: must be >= 1"),
        ({"groups": "column"}, "weights.groups='column': unknown value; valid values: columns, rows, units, heads"),
        ({"every": 0.0}, "weights.every=0.0: must be > 0"),
        ({"keep": 0.5, "start": 4.0, "prune": 4.0}, "weights.start=4.0: must be < weights.prune=4ep"),
        ({"rho": 0.0}, "weights.rho=0.0: must be > 0"),
    ):
        with pytest.raises(SettingsError) as error:
            AdmmSettings(**given)
        assert words in str(error.value)
    with pytest.raises(
        ValueError, match=r"weights\.prune=9ep with epochs=9: no group would be pruned; set weights\.prune <= 8ep"
    ):
        settings(MagnitudeSettings).refuse_epochs(9)
    assert [epoch for epoch in range(12) if due(settings(AdmmSettings, start=1.5, every=3.0), epoch)] == [2, 5, 8, 11]
    assert (
        settings(AdmmSettings).summary
        == "0.5 of the columns of 4 x 4 blocks (per block) from epoch 9 on; a penalty from epoch 0 on"
    )
    assert MagnitudeSettings(keep=0.3, groups="heads").summary == "0.3 of the heads (per block) from epoch 150 on"
    assert AdmmSettings().summary == WEIGHTS["all"]().summary == ""
