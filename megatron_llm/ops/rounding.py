"""Stochastic rounding of float32 to bfloat16: up or down with the probability that makes the mean right. For `ops/chunks.py`.

A moment that moves by less than half a unit of bfloat16 (2^-9 of its value) a step never moves if rounded to nearest; with
beta2 = 0.999 that is most of them. Rounded stochastically it follows float32 on average (Gupta et al. 2015, arXiv 1502.02551).

The 16 low bits of a float32 are what bfloat16 cuts off. Adding 16 random bits and then cutting rounds away from zero with
probability low / 2^16: exactly unbiased. What bfloat16 has stays as it is, infinities and NaNs too. A finite value beyond the
largest bfloat16, 3.39e38, becomes that or infinity; rounded to nearest it would be infinity from the middle on.

The bits of an element are a pure function of (key, index), so a rank needs no state and any cut gives the same numbers. The
generator is SplitMix64 (Steele, Lea, Flood 2014) with words of 32 bits, i.e. a Weyl sequence through a mixer of two
multiplications; the mixer is Wellons's (hash-prospector, 2018). It costs a dozen int32 operations, half the bytes of the one in
`ops/random.py`. Arithmetic wraps; torch has no logical right shift for int32, hence the masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.ops.random import stream_key

_GOLDEN = 0x9E3779B9
_MIX_1 = 0x21F0AAAD
_MIX_2 = 0x735A2D97


@dataclass(frozen=True)
class StochasticRounding:
    """Which random bits a run of elements gets.

    Attributes:
        key: of the update and the buffer, e.g. `stream_key(seed, "round", update, bucket)`; keys that differ in any bit give
            unrelated bits. The two moments of AdamW share a key: each has 16 of an element's 32 bits.
        start: index of the run's first element, the same in whatever way the buffer is cut. Elements 2^32 apart share bits.
    """

    key: int
    start: int

    def offset(self, first: int) -> int:
        """The int32 from which the bits of element `first` of the run are mixed; each element adds the same step to it."""
        return _signed(stream_key(self.key) + (self.start + first) * _GOLDEN)


class RoundingBits:
    """Draws the random bits of a run, in buffers for `size` elements at a time: new ones for every chunk would be new pages."""

    def __init__(self, rounding: StochasticRounding, size: int, device: torch.device):
        self._rounding = rounding
        self._steps = torch.arange(size, dtype=torch.int32, device=device).mul_(_signed(_GOLDEN))
        self._z, self._t = torch.empty_like(self._steps), torch.empty_like(self._steps)

    def draw(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Two independent sets of 16 bits for elements first ... first + count of the run: int32 [count] in [0, 2^16).

        They are valid until the next call.
        """
        z, t = self._z[:count], self._t[:count]
        torch.add(self._steps[:count], self._rounding.offset(first), out=z)
        torch.bitwise_right_shift(z, 16, out=t)
        z.bitwise_xor_(t.bitwise_and_(0xFFFF)).mul_(_signed(_MIX_1))
        torch.bitwise_right_shift(z, 15, out=t)
        z.bitwise_xor_(t.bitwise_and_(0x1FFFF)).mul_(_signed(_MIX_2))
        torch.bitwise_right_shift(z, 16, out=t)
        return z.bitwise_xor_(t).bitwise_and_(0xFFFF), t.bitwise_and_(0xFFFF)


def round_into(narrow: Tensor, wide: Tensor, bits: Tensor) -> None:
    """Round float32 (or float64, to nearest first) [n] into bfloat16 [n] with bits of `RoundingBits`; `wide` is consumed."""
    # NaN first gets the one bit pattern to which 16 bits can be added: CUDA's own, 0x7FFFFFFF, would become -0.
    wide = wide.float().nan_to_num_(torch.nan, torch.inf, -torch.inf)
    wide.view(torch.int32).add_(bits).bitwise_and_(-0x10000)
    narrow.copy_(wide)


def _signed(x: int) -> int:
    """The int32 that has the low 32 bits of x."""
    return (x + 2**31) % 2**32 - 2**31
