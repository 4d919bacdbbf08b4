"""What the command line costs before it does anything: no torch for --help, and OpenMP threads that do not spin on busy cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from trainer.__main__ import main


def test_help_imports_neither_torch_nor_a_plotting_library():
    """.3 s in place of several; `python -X importtime -m trainer --help` shows where a regression comes from."""
    program = (
        "import sys; from trainer.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'timm', 'numpy', 'matplotlib', 'deepspeed', 'mlflow', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_openmp_threads_wait_passively_unless_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for given, found in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        assert main(["config", "data.lanes"]) == 0
        assert os.environ["OMP_WAIT_POLICY"] == found
