"""Runs of two ranks under `launch local --resume`, with faults at random moments: ten of each kind, and each run is the undisturbed one.

The seeds of the moments are printed; TRILEVEL_FAULTS=SEED begins with one. TRILEVEL_FAULTS_FILE=FILE keeps the results of runs and
goes on from them.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.live_job import undisturbed
from tests.faults.measure import judged, until
from tests.faults.places import missing
from tests.faults.random_kinds import KINDS

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(3600)]
OF_EACH = 10


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), digits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives_faults_at_random_moments(kind: str, reference: Path, digits: Path, tmp_path: Path) -> None:
    if reason := missing(KINDS[kind].place):
        pytest.skip(reason)
    file = Path(os.environ.get("TRILEVEL_FAULTS_FILE", tmp_path / "faults.jsonl"))
    seed = int(os.environ.get("TRILEVEL_FAULTS", random.randrange(10**6)))
    for findings in until(OF_EACH, kind, seed, file, tmp_path, digits, reference):
        assert not (wrong := judged(findings)), f"TRILEVEL_FAULTS={findings.seed}: {wrong}\n{findings.output}"
