"""Softmax cross-entropy on one rank's slice of the vocabulary, as statistics that combine across ranks.

loss = log(sum_v exp(z_v)) - z_label. Each rank contributes the maximum, the sum of exponentials below a common maximum
and the label's logit if it owns the label; `parallel/loss.py` combines them and calls the backward.

Work is done in chunks of tokens that stay in cache, in `stat_dtype`; the logits themselves keep the compute dtype and
are overwritten by their gradient: no second [T, V] tensor exists.

Shape suffixes: T tokens, V local vocabulary (padding columns already cut off).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}  # a chunk in cache; on a GPU, one that fills it


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


def _chunks(logits_TV: Tensor) -> list[slice]:
    """Row ranges of about a chunk's elements each."""
    tokens, vocab = logits_TV.shape
    rows = max(1, CHUNK_ELEMENTS[logits_TV.device.type] // vocab)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def local_statistics(logits_TV: Tensor, local_labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exp(z - max), label logit), each [T] in `stat_dtype`.

    local_labels_T: label minus the first id of this slice; outside [0, V) the label logit is 0. An empty slice (V = 0)
    gives max = -inf and sum = 0.
    """
    tokens, vocab = logits_TV.shape
    wide = stat_dtype(logits_TV.dtype)
    maximum_T = torch.full((tokens,), -torch.inf, dtype=wide, device=logits_TV.device)
    total_T = torch.zeros(tokens, dtype=wide, device=logits_TV.device)
    target_T = torch.zeros(tokens, dtype=wide, device=logits_TV.device)
    if vocab == 0:
        return maximum_T, total_T, target_T
    for rows in _chunks(logits_TV):
        chunk = logits_TV[rows].to(wide)
        torch.amax(chunk, dim=1, out=maximum_T[rows])
        torch.sum((chunk - maximum_T[rows, None]).exp_(), dim=1, out=total_T[rows])
    own_T = (local_labels_T >= 0) & (local_labels_T < vocab)
    picked_T = logits_TV.gather(1, local_labels_T.clamp(0, vocab - 1)[:, None]).squeeze(1)
    return maximum_T, total_T, torch.where(own_T, picked_T.to(wide), target_T)


def logits_sums(logits_TV: Tensor) -> Tensor:
    """The sum of each token's logits, [T] in `stat_dtype`: with label smoothing every logit is a bit of a label's."""
    sums_T = torch.zeros(len(logits_TV), dtype=stat_dtype(logits_TV.dtype), device=logits_TV.device)
    if logits_TV.shape[1]:
        for rows in _chunks(logits_TV):
            torch.sum(logits_TV[rows], dim=1, dtype=sums_T.dtype, out=sums_T[rows])
    return sums_T


def logits_gradient_(
    logits_TV: Tensor,
    local_labels_T: Tensor,
    log_sum_exp_T: Tensor,
    scale_T: Tensor,
    penalties: Penalties = Penalties(),
) -> None:
    """Overwrite logits by scale * (softmax - onehot(label)), the gradient of sum over tokens of scale * loss; with penalties by

    scale * ((1 + 2 * z_loss * log_sum_exp) * softmax - (1 - smoothing) * onehot(label) - smoothing / vocabulary)
    """
    vocab = logits_TV.shape[1]
    if vocab == 0:
        return
    wide = log_sum_exp_T.dtype
    own_T = ((local_labels_T >= 0) & (local_labels_T < vocab)).to(wide) * (1 - penalties.smoothing)
    index_T1 = local_labels_T.clamp(0, vocab - 1)[:, None]
    for rows in _chunks(logits_TV):
        chunk = logits_TV[rows]
        gradient = chunk.to(wide).sub_(log_sum_exp_T[rows, None]).exp_()  # the chunk itself if it is wide already
        if penalties.z_loss:
            gradient.mul_(log_sum_exp_T[rows, None] * (2 * penalties.z_loss) + 1)
        if penalties.smoothing:
            gradient.sub_(penalties.smoothing / penalties.vocabulary)
        gradient.scatter_add_(1, index_T1[rows], -own_T[rows, None]).mul_(scale_T[rows, None])
        if gradient.data_ptr() != chunk.data_ptr():
            chunk.copy_(gradient)
