"""Softmax cross-entropy on one rank's slice of the vocabulary, as statistics that combine across ranks.

loss = log(sum_v exp(z_v)) - z_label. Each rank contributes the maximum, the sum of exponentials below its maximum and the
label's logit if it owns the label; `parallel/loss.py` combines them and calls the backward. z is what the head makes, or, with a
soft-cap (Gemma 2), cap * tanh(of that / cap): the cap is part of statistics and gradient, so that no capped copy exists.

Work is done in chunks of tokens that stay in cache, in `stat_dtype`; the logits themselves keep the compute dtype and
are overwritten by their gradient: no second [T, V] tensor exists. The kernels in Triton need no chunks.

Shape suffixes: T tokens, V local vocabulary with its padding columns, which come last; U those before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}  # a chunk in cache; on a GPU, one that fills it

Extra = Literal["", "sum", "best"]


@dataclass(frozen=True)
class Penalties:
    """What training adds to the loss of a token with logits z and label y, where lse = log(sum_v exp(z_v)):

    (1 - smoothing) * (lse - z_y) + smoothing * mean_v(lse - z_v) + z_loss * lse^2

    Label smoothing is that of torch's cross_entropy, z-loss that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, 5).
    vocabulary: ids on all ranks, without padding.
    """

    vocabulary: int = 1
    smoothing: float = 0.0
    z_loss: float = 0.0


def _chunks(logits_TU: Tensor) -> list[slice]:
    """Row ranges of about a chunk's elements each."""
    tokens, vocab = logits_TU.shape
    rows = max(1, CHUNK_ELEMENTS[logits_TU.device.type] // vocab)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def local_statistics(
    logits_TV: Tensor,
    local_labels_T: Tensor,
    width: int | None = None,
    extra: Extra = "",
    cap: float | None = None,
    kernel: str = "torch",
) -> Tensor:
    """[T, 3] in `stat_dtype`: the maximum, the sum of exp(z - maximum), z of the label. Reads the logits once.

    local_labels_T: label minus the first id of this slice; outside [0, width) the label's z is 0.
    width: how many columns are ids; None: all. An empty slice (width = 0) gives maximum = -inf and sum = 0.
    extra: a fourth column: "sum" of all z, or "best", the column of the largest z, the first of several, 0 in an empty slice.
    """
    width = logits_TV.shape[1] if width is None else width
    if kernel == "triton":
        from megatron_llm.ops.triton.cross_entropy import statistics

        return statistics(logits_TV, local_labels_T.contiguous(), width, extra, cap or 0.0)
    logits_TU = logits_TV[:, :width]
    wide = stat_dtype(logits_TV.dtype)
    found = torch.zeros(len(logits_TU), 4 if extra else 3, dtype=wide, device=logits_TU.device)
    if width == 0:
        found[:, 0] = -torch.inf
        return found
    for rows in _chunks(logits_TU):
        chunk = _capped(logits_TU[rows].to(wide), cap)
        maximum = chunk.amax(1)
        found[rows, 0] = maximum
        if extra == "sum":
            found[rows, 3] = chunk.sum(1)
        elif extra == "best":
            found[rows, 3] = chunk.argmax(1).to(wide)  # exact below 2^24 even in float32
        found[rows, 1] = (chunk - maximum[:, None]).exp_().sum(1)
    own_T = (local_labels_T >= 0) & (local_labels_T < width)
    picked_T = logits_TU.gather(1, local_labels_T.clamp(0, width - 1)[:, None]).squeeze(1)
    found[:, 2] = torch.where(own_T, _capped(picked_T.to(wide), cap), found[:, 2])
    return found


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def logits_gradient_(
    logits_TV: Tensor,
    local_labels_T: Tensor,
    log_sum_exp_T: Tensor,
    scale_T: Tensor,
    penalties: Penalties = Penalties(),
    width: int | None = None,
    cap: float | None = None,
    kernel: str = "torch",
) -> None:
    """Overwrite logits by scale * (softmax - onehot(label)), the gradient of sum over tokens of scale * loss; with penalties by

    scale * ((1 + 2 * z_loss * log_sum_exp) * softmax - (1 - smoothing) * onehot(label) - smoothing / vocabulary)

    With a soft-cap, by that times its slope, 1 - tanh^2. Columns from `width` on, which are no ids, by zero.
    """
    width = logits_TV.shape[1] if width is None else width
    share = penalties.smoothing / penalties.vocabulary
    if kernel == "triton":
        from megatron_llm.ops.triton.cross_entropy import gradient_

        tokens = local_labels_T.contiguous(), log_sum_exp_T.contiguous(), scale_T.contiguous()
        gradient_(logits_TV, *tokens, width, penalties.smoothing, share, penalties.z_loss, cap or 0.0)
        return
    logits_TU = logits_TV[:, :width]
    logits_TV[:, width:] = 0
    if width == 0:
        return
    wide = log_sum_exp_T.dtype
    own_T = ((local_labels_T >= 0) & (local_labels_T < width)).to(wide) * (1 - penalties.smoothing)
    index_T1 = local_labels_T.clamp(0, width - 1)[:, None]
    for rows in _chunks(logits_TU):
        chunk = logits_TU[rows]
        gradient = chunk.to(wide)  # the chunk itself if it is wide already
        if cap is not None:
            tanh = torch.tanh(gradient / cap)
            gradient = tanh * cap
        gradient = gradient.sub_(log_sum_exp_T[rows, None]).exp_()
        if penalties.z_loss:
            gradient.mul_(log_sum_exp_T[rows, None] * (2 * penalties.z_loss) + 1)
        if penalties.smoothing:
            gradient.sub_(share)
        gradient.scatter_add_(1, index_T1[rows], -own_T[rows, None]).mul_(scale_T[rows, None])
        if cap is not None:
            gradient.mul_(tanh.square_().neg_().add_(1))
        if gradient.data_ptr() != chunk.data_ptr():
            chunk.copy_(gradient)
