"""Lion (Chen et al. 2023, arXiv 2302.06675) on a flat run of elements. Called by `optim/state.py`.

With g = gradient * scale:  w = w (1 - lr * decay) - lr * sign(b1 m + (1-b1) g);  m = b2 m + (1-b2) g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_llm.ops.chunks import check_rounding, update_in_chunks
from megatron_llm.ops.rounding import StochasticRounding


def lion_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    *,
    out: Tensor | None,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    rounding: StochasticRounding | None,
    kernel: str = "torch",
) -> None:
    """Update weights and m in place; the gradient is consumed. Arguments as those of `adamw_`."""
    check_rounding(m, rounding)
    if kernel == "triton":
        from megatron_llm.ops.triton import update as fused_update

        fused_update.lion_(weights, gradient, m, out, scale, lr, betas, weight_decay, rounding)
        return

    def chunk_update(w: Tensor, g: Tensor, m: Tensor, direction: Tensor) -> None:
        torch.mul(m, betas[0], out=direction).add_(g.mul_(scale * (1.0 - betas[0]))).sign_()
        w.mul_(1.0 - lr * weight_decay).sub_(direction.mul_(lr))
        m.mul_(betas[1]).add_(g.mul_((1.0 - betas[1]) / (1.0 - betas[0])))

    update_in_chunks(chunk_update, weights, gradient, (m,), out, rounding, scratch=1)
