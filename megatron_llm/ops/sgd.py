"""SGD with momentum and decoupled weight decay on a flat run of elements. Called by `optim/state.py`.

With g = gradient * scale:  m = momentum * m + g;  w = w (1 - lr * decay) - lr * m. That is torch's SGD without dampening, except
that weight decay does not pass through the momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_llm.ops.chunks import check_rounding, update_in_chunks
from megatron_llm.ops.rounding import StochasticRounding


def sgd_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    *,
    out: Tensor | None,
    scale: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    rounding: StochasticRounding | None,
    kernel: str = "torch",
) -> None:
    """Update weights and m in place; the gradient is consumed. Arguments as those of `adamw_`."""
    check_rounding(m, rounding)
    if kernel == "triton":
        from megatron_llm.ops.triton import update as fused_update

        fused_update.sgd_(weights, gradient, m, out, scale, lr, momentum, weight_decay, rounding)
        return

    def chunk_update(w: Tensor, g: Tensor, m: Tensor) -> None:
        m.mul_(momentum).add_(g.mul_(scale))
        w.mul_(1.0 - lr * weight_decay).sub_(torch.mul(m, lr, out=g))

    update_in_chunks(chunk_update, weights, gradient, (m,), out, rounding)
