"""AdamW (Loshchilov & Hutter 2019) on a flat run of elements, through torch's fused kernels or ours. Called by `optim/state.py`.

With g = gradient * scale:  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
w = w (1 - lr * decay) - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.chunks import check_rounding, update_in_chunks
from megatron_llm.ops.rounding import StochasticRounding

_VECTOR = 64  # elements: a multiple of every processor's vector, and of the unit in which torch deals work to threads


def adamw_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    out: Tensor | None,
    scale: float,
    update: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: StochasticRounding | None,
    kernel: str = "torch",
) -> None:
    """Update weights, m and v, all [n] and contiguous, in place; the gradient is consumed.

    weights: float32 or float64; gradient: the same. m, v: the same, or bfloat16, which needs `rounding`.
    out: [n], gets the new weights in its dtype; None where the weights are those that are computed with.
    scale: factor on the gradient (one over the sum of loss weights, times the clipping coefficient).
    update: number of this update, from 1; the bias corrections follow from it.
    kernel: "torch", or "triton", which leaves the gradient as it was and needs weights in float32.
    """
    check_rounding(m, rounding)
    if kernel == "triton":
        from megatron_llm.ops.triton import update as fused_update

        fused_update.adamw_(weights, gradient, m, v, out, scale, update, lr, betas, eps, weight_decay, rounding)
        return
    device, on_gpu = weights.device, weights.is_cuda
    # The fused kernel divides by a *float32* grad_scale; float64 runs exist for proofs at 1e-9, so they multiply first.
    exact = weights.dtype is torch.float64
    grad_scale = None if exact else torch.full((), 1.0 / scale, dtype=torch.float32, device=device)
    step = torch.full((), float(update), dtype=torch.float32, device=device)

    def fused(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        torch._fused_adamw_(
            [w],
            [g],
            [m],
            [v],
            [],
            [step],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
        )

    def chunk_update(*tensors: Tensor) -> None:
        if exact:
            tensors[1].mul_(scale)
        size = tensors[0].numel()
        # The CPU kernel ends in a scalar loop that rounds differently: it gets whole vectors only, the last one padded.
        rest = 0 if on_gpu else size % _VECTOR
        if size > rest:
            fused(*(tensor[: size - rest] for tensor in tensors))
        if rest:
            padded = [functional.pad(tensor[-rest:], (0, _VECTOR - rest)) for tensor in tensors]
            fused(*padded)
            for tensor, full in zip(tensors, padded, strict=True):
                tensor[-rest:].copy_(full[:rest])

    # On a GPU the kernel gives a block 65,536 elements, so that chunks of the size of the cache would leave most of it idle.
    # With nothing to widen and round, one chunk costs at most one more reading of the weights, for `out`.
    one_chunk = rounding is None and (on_gpu or out is None)
    update_in_chunks(chunk_update, weights, gradient, (m, v), out, rounding, chunk=weights.numel() if one_chunk else None)
