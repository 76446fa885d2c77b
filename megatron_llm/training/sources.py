"""Fresh weights as a `TensorSource`, the sibling of a Hugging Face folder and a checkpoint. Called by `training/build.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_llm.ops.random import normal, stream_key, uniform
from megatron_llm.parallel.shard import Box, Part

_CHUNK_ELEMENTS = 1 << 20


class FreshWeights:
    """Normal weights, ones for norms, zeros for biases, and adapters as PEFT begins them (A uniform, B zero).

    A function of (seed, standard deviation, name, logical index) alone.

    So a model starts from the same weights in every layout, and no rank makes more than it holds. They are made on `device`: a
    processor makes some ten million a second. Kinds of devices round the last bits of their float64 differently.
    """

    def __init__(self, seed: int, standard_deviation: float, device: torch.device | None = None):
        self.seed, self.standard_deviation, self.device = seed, standard_deviation, device

    def read(self, part: Part, box: Box) -> Tensor:
        """float64 values of a box of the logical tensor."""
        if part.init in ("ones", "zeros"):
            return torch.full(box.shape, float(part.init == "ones"), dtype=torch.float64, device=self.device)
        key = stream_key(self.seed, "init", part.name)
        values = torch.empty(box.numel, dtype=torch.float64, device=self.device)
        for start in range(0, box.numel, _CHUNK_ELEMENTS):
            flat = torch.arange(start, min(start + _CHUNK_ELEMENTS, box.numel), device=self.device)
            index = _logical_index(flat, box, part.shape)
            values[start : start + flat.numel()] = normal(key, index) if part.init == "normal" else uniform(key, index)
        if part.init == "uniform":  # kaiming_uniform_ with a = sqrt(5), as PEFT: within 1 / sqrt(inputs)
            return values.mul_(2.0).sub_(1.0).mul_(part.shape[-1] ** -0.5).view(box.shape)
        return values.mul_(self.standard_deviation).view(box.shape)


def _logical_index(flat: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    """Row-major index in a tensor of `shape` of the elements number `flat` of a box of it."""
    index = torch.zeros_like(flat)
    for dim in range(len(shape)):
        inner = math.prod(box.shape[dim + 1 :])
        coordinate = (flat // inner) % box.shape[dim] + box.offset[dim]
        index = index * shape[dim] + coordinate
    return index
