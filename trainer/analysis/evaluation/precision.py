"""The device and the precision of forward passes after training: those of the run on a GPU, float32 on a CPU.

Evaluation, calibration and agreement share them, so that a threshold is found in the precision in which it is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from trainer.config.run_config import Config


class Computed(NamedTuple):
    """half: bf16 autocast."""

    device: torch.device
    half: bool

    @classmethod
    def of(cls, config: Config) -> Computed:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, config.engine.precision != "float32" and device.type == "cuda")

    def place(self, *networks: nn.Module) -> None:
        """Move them to the device, in evaluation mode."""
        for network in networks:
            network.to(self.device).eval()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @property
    def name(self) -> str:
        return "bf16 autocast" if self.half else "float32"
