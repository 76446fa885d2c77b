"""Counter-based random numbers: the value at an index is a pure function of (key, index).

Weights are initialized by their logical index, so a fresh model is the same in every layout; dropout and noise go by seed, site,
layer, row, position and channel for the same reason. Called by `training/sources.py` and `ops/noise.py`.

The generator is SplitMix64 (Steele, Lea, Flood 2014) in counter mode, in int64 arithmetic that wraps; torch has no
logical right shift for it, hence the masks.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(*parts: int | str) -> int:
    """A 63-bit key for one stream of numbers, from its address, e.g. (seed, "init", "layers.0.mlp.up.weight")."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each int64 index, as int64, same shape."""
    z = (index * _GOLDEN).add_(key)
    shifted = z >> 30
    z.bitwise_xor_(shifted.bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    torch.bitwise_right_shift(z, 27, out=shifted)
    z.bitwise_xor_(shifted.bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    torch.bitwise_right_shift(z, 31, out=shifted)
    return z.bitwise_xor_(shifted.bitwise_and_((1 << 33) - 1))


def uniform(key: int, index: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2**-53, float64, one per int64 index."""
    return ((random_bits(key, index) >> 11) & ((1 << 53) - 1)).double().mul_(2.0**-53)


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal numbers (Box-Muller), float64, one per int64 index."""
    bits = random_bits(key, index)
    high = ((bits >> 32) & 0xFFFFFFFF).double()
    low = (bits & 0xFFFFFFFF).double()
    radius = ((high + 0.5) / 2.0**32).log_().mul_(-2.0).sqrt_()
    return radius * (low * (2.0 * math.pi / 2.0**32)).cos_()
