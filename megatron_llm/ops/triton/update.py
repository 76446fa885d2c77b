"""AdamW, Lion and SGD with momentum on a flat run of elements, in one pass. Called by `ops/adamw.py`, `lion.py` and `sgd.py`.

With f, the factor that undoes loss scale, weights of tokens and clipping, read on the device, and keep = 1 - lr * decay:

    adamw   g = gradient / f;   m += (1-b1) (g - m);   v = b2 v + (1-b2) g^2
            w = w keep - lr / (1-b1^t) m / (sqrt(v) / sqrt(1-b2^t) + eps)
    lion    g = gradient f (1-b1);   w = w keep - lr sign(b1 m + g);   m = b2 m + g (1-b2) / (1-b1)
    sgd     g = gradient f;   m = b1 m + g;   w = w keep - lr m

Bytes an element, each tensor read or written once, which is the least: gradient 4 (2 in bfloat16), master 8, each moment 8 (4 in
bfloat16), compute weights 2 where they are apart. AdamW: 30 with a float32 gradient, 28 with one in bfloat16, 22 and 20 with
bfloat16 moments; Lion and SGD 22 with a float32 gradient. The gradient is left as it was. Nothing is kept to be made again.

Every operation rounds once, products and sums apart (`enable_fp_fusion`), divisions and square roots as IEEE 754 says. So an
element gets the same bits in every block and at every offset, on which it rests that all numbers of ranks are equal; and those
of Lion, of SGD and of rounded moments are the bits that the torch path gives. AdamW's differ from those of torch's fused kernels
(which contract some products and sums, on a GPU in float64) by a few units in the last place.

Loads are of 16 bytes where a run begins and ends at multiples of 16 elements, as parameters of models do (`optim/layout.py`); for
others Triton compiles a second kernel, which is slower.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.rounding import StochasticRounding
from megatron_llm.ops.triton import cdiv

BLOCK = 1024  # elements of a program: 8 a thread, 16 bytes of a bfloat16 tensor
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _mixed(element, offset):
    """The 32 bits of an element before the mixer's last step: `ops/rounding.py`, in arithmetic that has a logical shift."""
    z = element.to(tl.uint32) * 0x9E3779B9 + offset.to(tl.uint32, bitcast=True)
    z = (z ^ (z >> 16)) * 0x21F0AAAD
    return (z ^ (z >> 15)) * 0x735A2D97


@triton.jit
def _stochastic(x, bits):
    """float32 -> bfloat16, up or down by 16 random bits. Any NaN becomes the one to which they can be added."""
    x = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    return ((x + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["offset"])
def update_kernel(
    W, G, M, V, OUT, F, n, keep, rate, b1, c1, b2, c2, root, eps, offset,
    RULE: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of [n]. V, OUT: or None. F: the factor, a scalar. offset: of the random bits, int32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    f = tl.load(F)
    w = tl.load(W + i, mask=here) * keep
    g = tl.load(G + i, mask=here).to(tl.float32)
    m = tl.load(M + i, mask=here).to(tl.float32)
    if RULE == "adamw":
        g = tl.div_rn(g, f)
        m = m + (g - m) * c1
        v = tl.load(V + i, mask=here).to(tl.float32) * b2 + c2 * g * g
        w += tl.div_rn(-rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    elif RULE == "lion":
        g *= f
        ahead = m * b1 + g
        w -= tl.where(ahead > 0, rate, tl.where(ahead < 0, -rate, 0.0))
        m = m * b2 + g * c2
    else:
        tl.static_assert(RULE == "sgd")
        m = m * b1 + g * f
        w -= m * rate
    tl.store(W + i, w, mask=here)
    if OUT is not None:
        tl.store(OUT + i, w.to(OUT.dtype.element_ty), mask=here)
    if NARROW:
        z = _mixed(i, offset)
        tl.store(M + i, _stochastic(m, (z ^ (z >> 16)) & 0xFFFF), mask=here)
        if V is not None:
            tl.store(V + i, _stochastic(v, z >> 16), mask=here)
    else:
        tl.store(M + i, m, mask=here)
        if V is not None:
            tl.store(V + i, v, mask=here)


@torch.library.custom_op("megatron_llm::update", mutates_args=("weights", "m", "v", "out"))
def update(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    factor: Tensor,
    rule: str,
    keep: float,
    rate: float,
    weights_of_m: list[float],
    weights_of_v: list[float],
    root: float,
    eps: float,
    offset: int | None,
) -> None:
    """One update of [n], all contiguous; weights in float32, m and v in that or in bfloat16, which needs an offset.

    v: AdamW's. out: gets the weights in its dtype. factor: scalar in float32. offset: what `RoundingBits` adds for element 0.
    keep, rate, weights_of_m (b1, c1), weights_of_v (b2, c2), root, eps: what the rules above call so.
    """
    n = weights.numel()
    if n:
        arguments = (keep, rate, *weights_of_m, *weights_of_v, root, eps, offset or 0)
        narrow = offset is not None
        update_kernel[(cdiv(n, BLOCK),)](
            weights, gradient, m, v, out, factor, n, *arguments, RULE=rule, NARROW=narrow, BLOCK=BLOCK, **OPTIONS
        )


@update.register_fake
def _fake(*_: Any) -> None:
    return None


def adamw_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    out: Tensor | None,
    scale: float,
    number: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: StochasticRounding | None,
) -> None:
    """As `ops.adamw.adamw_`. Statistics of the update are made in float64 and rounded once."""
    first, second = betas
    weights_of_m, weights_of_v = [first, 1.0 - first], [second, 1.0 - second]
    rate, root = lr / (1.0 - first**number), (1.0 - second**number) ** 0.5
    keep, offset = 1.0 - lr * weight_decay, _offset(rounding)
    factor = _scalar(1.0 / scale, weights)
    update(weights, gradient, m, v, out, factor, "adamw", keep, rate, weights_of_m, weights_of_v, root, eps, offset)


def lion_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    out: Tensor | None,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    rounding: StochasticRounding | None,
) -> None:
    """As `ops.lion.lion_`."""
    first, second = betas
    keep, offset = 1.0 - lr * weight_decay, _offset(rounding)
    factor = _scalar(scale * (1.0 - first), weights)
    weights_of_m, weights_of_g = [first, 0.0], [second, (1.0 - second) / (1.0 - first)]
    update(weights, gradient, m, None, out, factor, "lion", keep, lr, weights_of_m, weights_of_g, 1.0, 0.0, offset)


def sgd_(
    weights: Tensor,
    gradient: Tensor,
    m: Tensor,
    out: Tensor | None,
    scale: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    rounding: StochasticRounding | None,
) -> None:
    """As `ops.sgd.sgd_`."""
    keep, offset = 1.0 - lr * weight_decay, _offset(rounding)
    factor = _scalar(scale, weights)
    update(weights, gradient, m, None, out, factor, "sgd", keep, lr, [momentum, 0.0], [0.0, 0.0], 1.0, 0.0, offset)


def _scalar(x: float, like: Tensor) -> Tensor:
    return torch.full((), x, dtype=torch.float32, device=like.device)


def _offset(rounding: StochasticRounding | None) -> int | None:
    return None if rounding is None else rounding.offset(0)
