"""The sum of squares of a flat run of gradients: a rank's share of the squared norm. Called by `optim/zero1.py`.

It stays on the device: the host reads it once a step, with the loss (`training/step.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 30
"""Elements of one `dot`, which on a GPU counts them in 32 bits and refuses more than 2^31 - 1."""


def sum_of_squares(x: Tensor, kernel: str = "torch", piece: int = _PIECE) -> Tensor:
    """[n], contiguous -> a scalar of the same dtype, in Triton of float32. piece: elements that torch takes at a time."""
    if kernel == "triton":
        from megatron_llm.ops.triton.grad_norm import sum_of_squares

        return sum_of_squares(x)
    first, *others = (part.dot(part) for part in x.split(piece))
    return first if not others else torch.stack([first, *others]).sum()
