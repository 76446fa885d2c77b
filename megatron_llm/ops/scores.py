"""What stands between q k^T and the softmax of attention, and what else a backend of `ops/attention.py` is told.

Shape suffixes: T query tokens, S key tokens, N query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shared = dict[object, Any]
"""What the layers of one pass make once for all of them, by what it depends on: masks, boundaries, lists of tiles."""


@dataclass(frozen=True)
class Scores:
    """What happens to scores between q k^T and the softmax, in this order.

    Attributes:
        scale: they are multiplied by it; None: 1 / sqrt(D).
        softcap: they become cap * tanh(scores / cap).
        slopes_N: ALiBi (Press et al. 2022): less slope * distance, for each query head here.
        coarse: ALiBi as a bfloat16 number, slope * position of the key, multiplied by the scale like the scores (Falcon).
        window: a query sees so many keys, itself included; None: all before it.
    """

    scale: float | None = None
    softcap: float | None = None
    slopes_N: Tensor | None = None
    coarse: bool = False
    window: int | None = None

    def factor(self, head_dim: int) -> float:
        """The scale as a number."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def bias(self, q_len: int, k_len: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
        """ALiBi's [N, q_len, k_len] (or [N, 1, k_len]), None without; the last query is at the last key's position."""
        if self.slopes_N is None:
            return None
        keys_S = torch.arange(k_len, device=self.slopes_N.device)
        if self.coarse:
            bias_N1S = (self.slopes_N.bfloat16()[:, None] * keys_S)[:, None].to(dtype)
            return bias_N1S * self.factor(head_dim)
        distance_TS = keys_S - keys_S[k_len - q_len :, None]
        return (self.slopes_N[:, None, None] * distance_TS).to(dtype)


class Terms(NamedTuple):
    """All that attention is told besides q, k and v.

    Attributes:
        cu_q, cu_k: where documents begin and end among the queries, and among the keys.
        shared: of the pass that this is part of. deterministic: the same bits again in backward.
    """

    cu_q: Sequence[int]
    cu_k: Sequence[int]
    scores: Scores
    shared: Shared
    deterministic: bool = False


Attend = Callable[[Tensor, Tensor, Tensor, Terms], Tensor]
"""How a backend is called: [T, N, D], [S, K, D], [S, K, D] -> [T, N, D], of at least one query."""


def alibi_slopes(heads: int, bias_max: float = 8.0) -> list[float]:
    """The slope of each head: 2^(-bias_max * i / heads) for powers of two; others take every second one of twice as many too."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-bias_max * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


def causal_mask(q_len: int, k_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [q_len, k_len], True where attention is allowed; the last query is at the last key's position."""
    allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
    return allowed if window is None else allowed.triu(k_len - q_len - window + 1)
