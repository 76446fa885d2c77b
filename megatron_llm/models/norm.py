"""RMSNorm as a module with its place in the whole model. Called by `models/block.py` and `models/decoder.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.ops.rms_norm import rms_norm
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import norm_weight_gradient


class RMSNorm(nn.Module):
    """[*, H] -> [*, H]. The weight is replicated over tp; under sequence parallelism each rank normalizes only its own
    tokens, so the ranks' gradients are partial sums, which the spec says.
    """

    def __init__(
        self, name: str, size: int, eps: float, tp: Axis, partial_gradient: bool, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        whole = Box.full((size,))
        summed = tp if partial_gradient and tp.size > 1 else None
        part = Part(name, (size,), ((whole, whole),), "ones", tp.size, tp.rank, summed)
        self.weight.shard = ShardSpec((part,), decay=False)  # type: ignore[attr-defined]

    def forward(self, x_TH: Tensor) -> Tensor:
        return rms_norm(x_TH, self.weight, self.eps, norm_weight_gradient)
