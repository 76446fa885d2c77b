"""Row order without index files: a keyed permutation of [0, n) that is computed, not stored.

A row number is split in two halves and sent through a Feistel network (Luby & Rackoff 1988), which is a bijection of
[0, 4^k) whatever its round function; numbers that land outside [0, n) are sent through again ("cycle walking", Black &
Rogaway 2002) until they fall inside, which keeps it a bijection of [0, n). O(1) memory at any n, and any row's place is
known without computing the others'. `rows.py` takes one per source and epoch.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

_MASK64: Final = (1 << 64) - 1
_ROUNDS: Final = 8


def mix64(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): a fixed bijection of 64-bit integers that scrambles well."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def hash64(*numbers: int) -> int:
    """One well-scrambled 64-bit integer for a tuple of integers; the key of everything random in this package."""
    value = 0
    for number in numbers:
        value = mix64(value ^ (number & _MASK64))
    return value


def hash_numbers(seed: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """`hash64(seed, number)` for an array of numbers, uint64."""
    value = numbers.astype(np.uint64) ^ np.uint64(hash64(seed))
    value += np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Permutation:
    """The permutation of [0, n) that belongs to (seed, epoch). `permutation(i)` is the i-th row to visit."""

    def __init__(self, n: int, seed: int, epoch: int):
        assert n > 0
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [hash64(seed, epoch, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Raises IndexError outside [0, n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"row {index} of {self.n}")
        index = self._feistel(index)
        while index >= self.n:  # the domain is less than 4 n, so fewer than 4 walks are expected
            index = self._feistel(index)
        return index

    def _feistel(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._half_mask)
        return left << self._half_bits | right


@functools.lru_cache(maxsize=1024)
def permutation(n: int, seed: int, epoch: int) -> Permutation:
    """`Permutation(n, seed, epoch)`, kept: a run asks for the same few again and again, and making the keys takes time."""
    return Permutation(n, seed, epoch)
