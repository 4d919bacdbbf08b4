"""The Dockerfile can't be built in a test; what it names must at least be there, and the constraints must bind."""

from __future__ import annotations

import fnmatch
import re
import shlex
from importlib import metadata

import pytest
import torch

from tests.conftest import ROOT

# one instruction per entry, continued lines joined, comments left out
TEXT = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line.strip()]


def test_what_is_copied_exists_and_is_not_ignored():
    copied = [word for line in LINES if line.startswith("COPY ") for word in shlex.split(line)[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "trainer", "sparsity", "launch", "configs"} <= set(copied)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_the_package_has_all_that_its_build_reads():
    project = (ROOT / "pyproject.toml").read_text()
    copied = " ".join(line for line in LINES if line.startswith("COPY "))
    for name in (*re.findall(r'^readme = "(.+)"', project, re.M), *re.findall(r'license-files = \["(.+)"\]', project)):
        assert name in copied, name


def test_every_installation_is_bound_by_the_constraints_that_exist():
    installs = [line for line in LINES if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
    pinned = (ROOT / "constraints.txt").read_text()
    for name in re.findall(r"/\^([\w-]+)==/p", TEXT):
        assert re.search(rf"^{name}==", pinned, re.M), name


def test_the_base_fits_the_python_and_instructions_are_known():
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in LINES} <= known and LINES[0].startswith("FROM ")
    assert "devel" in LINES[0], "without nvcc DeepSpeed complains when it is imported"


def test_the_cuda_of_the_base_is_torchs():
    """DeepSpeed refuses to compile CUDA extensions by another one (assert_no_cuda_mismatch); of 13 it takes no neighbour."""
    wanted = [re.search(r"^cuda-toolkit.*==(\d+\.\d+)\.", text) for text in metadata.requires("torch") or []]
    found = [match[1] for match in wanted if match] or [torch.version.cuda]
    if not found[0]:
        pytest.skip("this torch is a CPU build, without the CUDA version of other builds")
    assert f"nvidia/cuda:{found[0]}." in LINES[0]
