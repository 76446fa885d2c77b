"""What the modules of a stage are made of and for. Made by `models/decoder.py`, handed to every constructor of this package."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_llm.config import ModelConfig
from megatron_llm.ops.kernels import Kernels
from megatron_llm.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class Setup:
    """Attributes:
    partial: whether a rank sees only its own tokens of hidden states (sequence parallelism).
    dtype, device: of the parameters. kernels: which implementation of each operation runs.
    """

    model: ModelConfig
    grid: Grid
    partial: bool
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels = Kernels()

    @property
    def tp(self) -> Axis:
        return self.grid.tp
