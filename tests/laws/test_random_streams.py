"""Stored values of the random streams that come from numpy: numpy may change them between releases (its policy, NEP 19), and resume,
replay and audit of a run from before would then draw something else. If a test here is red, keep the old numpy (`constraints.txt`)."""

from __future__ import annotations

import numpy as np
import pytest

from sparsity.examples.curriculum import Draw
from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import Mix, draw_mix

MIXES = [
    Mix(0.020917255533395043),
    Mix(0.1474289117834598),
    Mix(0.5503826530612245, (0, 188, 104, 224)),
    Mix(0.4423385469853167),
    Mix(0.9090202487244898, (0, 83, 169, 224)),
    Mix(0.9086814413265306, (0, 79, 0, 58)),
]


def test_mixup_and_cutmix_draw_what_they_drew_with_numpy_2_4() -> None:
    augment = AugmentConfig(mixup=0.8, cutmix=1.0)
    for step, stored in enumerate(MIXES):
        drawn = draw_mix(augment, 7, step, 224)
        assert drawn.box == stored.box and drawn.lam == pytest.approx(stored.lam, rel=1e-12)


def test_the_order_of_dropped_examples_is_that_of_numpy_2_4() -> None:
    """The generator and the call of `Curriculum._starting_set`."""
    stored = [3, 8, 12, 13, 14, 16, 10, 15, 1, 6, 0, 7, 4, 18, 5, 19, 17, 2, 9, 11]
    assert np.random.default_rng((7, int(Draw.START), 0)).permutation(20).tolist() == stored
