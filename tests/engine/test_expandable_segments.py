"""CUDA memory grows in segments that change their size, unless the user chose otherwise, or CUDA graphs hold addresses."""

from __future__ import annotations

import pytest
import torch

from trainer.engine.environment import use_expandable_segments


@pytest.mark.parametrize(
    ("gpu", "graphs", "variables", "chosen"),
    [
        (True, False, {}, ["expandable_segments:True"]),
        (True, True, {}, []),
        (False, False, {}, []),
        (True, False, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, []),
        (True, False, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, []),
    ],
)
def test_when(monkeypatch: pytest.MonkeyPatch, gpu: bool, graphs: bool, variables: dict[str, str], chosen: list[str]) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    use_expandable_segments(graphs)
    assert settings == chosen


def test_torch_takes_the_setting() -> None:
    """Without a GPU too; a name that torch did not know would raise."""
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        assert "expandable_segments:True" in torch._C._accelerator_getAllocatorSettings()
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
