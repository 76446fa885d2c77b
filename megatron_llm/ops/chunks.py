"""One pass over memory for an update that is several tensor operations. Called by `ops/adamw.py`, `ops/lion.py`, `ops/sgd.py`.

Weights, gradient and moments are taken in chunks that stay in cache, so that widening and rounding bfloat16 moments, the
operations of the update and the rounding of the new weights meet what the operation before left there.

Updates must give an element the same bits wherever it lies in a chunk: that keeps every number of ranks equal, whose slices cut
buffers differently. torch's vectorized CPU loops end in scalar ones, and threads put such ends anywhere; compilers may contract
a product and a sum in one and not in the other. So an update uses operations that round once (a product, a sum, a sign), or
sees to it itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_llm.ops.rounding import RoundingBits, StochasticRounding, round_into

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 21}  # five float32 arrays of them: 5 MB in L2 and L3; 42 MB in a GPU's L2


def check_rounding(moment: Tensor, rounding: StochasticRounding | None) -> None:
    """Raises ValueError if bfloat16 moments come without `rounding`, or other moments with it."""
    if (moment.dtype is torch.bfloat16) is not (rounding is not None):
        raise ValueError(
            f"moments are {moment.dtype} and rounding is {rounding}: bfloat16 moments need a StochasticRounding, others none"
        )


def update_in_chunks(
    update: Callable[..., None],
    weights: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, ...],
    out: Tensor | None,
    rounding: StochasticRounding | None,
    *,
    scratch: int = 0,
    chunk: int | None = None,
) -> None:
    """Call `update(weights, gradient, *moments, *scratch)` on chunks [n] of one dtype, which it changes; then round into `out`.

    Moments in bfloat16 are widened before and rounded stochastically after, each with bits of its own.
    scratch: how many more tensors [n] the update works in. chunk: elements, by default what fits in the cache of the device.
    """
    narrow = rounding is not None
    size = weights.numel()
    chunk = max(1, min(size, chunk or CHUNK_ELEMENTS[weights.device.type]))
    spare = weights.new_empty(scratch + (len(moments) if narrow else 0), chunk)
    bits = RoundingBits(rounding, chunk, weights.device) if rounding is not None else None
    for start in range(0, size, chunk):
        at = slice(start, min(start + chunk, size))
        w = weights[at]
        working, wide = spare[:scratch, : w.numel()], spare[scratch:, : w.numel()]
        if bits is None:
            update(w, gradient[at], *(moment[at] for moment in moments), *working)
        else:
            for moment, x in zip(moments, wide, strict=True):
                x.copy_(moment[at])
            update(w, gradient[at], *wide, *working)
            for moment, x, random in zip(moments, wide, bits.draw(start, w.numel()), strict=False):
                round_into(moment[at], x, random)
        if out is not None:
            out[at].copy_(w)
