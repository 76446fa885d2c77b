"""AdamW (Loshchilov & Hutter 2019) on flat slices, through torch's fused kernels. Called by `optim/zero1.py`.

With g = gradient * scale:  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
w = w (1 - lr * decay) - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    scale: float,
    update: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update weights, m and v in place; gradients are consumed. All lists pair up; dtypes float32 or float64.

    scale: factor on the gradients (one over the sum of loss weights, times the clipping coefficient).
    update: number of this update, from 1; the bias corrections follow from it.
    """
    if not weights:
        return
    device = weights[0].device
    # The fused kernel divides by a *float32* grad_scale; float64 runs exist for proofs at 1e-9, so they multiply first.
    exact = weights[0].dtype is torch.float64
    if exact:
        torch._foreach_mul_(gradients, scale)
    adamw(
        weights,
        gradients,
        m,
        v,
        [],
        list(torch.full((len(weights),), float(update - 1), device=device).unbind()),  # torch counts each one up
        fused=True,
        grad_scale=None if exact else torch.full((), 1.0 / scale, dtype=torch.float32, device=device),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
