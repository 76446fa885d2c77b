"""Packing documents and conversations into rows: which of them share a row of `sequence_length` tokens.

A pure function of (lengths, sequence_length, seed, epoch), so every rank computes it for itself. Nothing is dropped:
every item lands in exactly one row. Epochs permute only among items of equal length, so the number of rows, and with it
the meaning of a row number, is the same in every epoch. Called by `rows.PackedRows`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_llm.data.order import hash64

try:  # the C++ extension is optional: same result, about 20 times the speed
    from megatron_llm._native import best_fit_decreasing as _native_best_fit
except ImportError:
    _native_best_fit = None

NATIVE = _native_best_fit is not None
GROUP = 1 << 24  # items packed together; bounds memory and keeps a group's time to seconds

Array = npt.NDArray[np.int64]
Method = Literal["best_fit", "in_order", "none"]


@dataclass(frozen=True)
class Packing:
    """Row r holds items[starts[r] : starts[r + 1]], in that order. int64 [items] and int64 [rows + 1]."""

    items: Array
    starts: Array

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Array:
        return self.items[self.starts[number] : self.starts[number + 1]]


def pack(
    lengths: npt.NDArray[Any],
    sequence_length: int,
    method: Method,
    seed: int,
    epoch: int,
    group: int = GROUP,
    rising: bool = False,
) -> Packing:
    """Pack items of `lengths` [n] (each 1 to sequence_length) into rows.

    `best_fit`: best-fit-decreasing in groups of `group` items. `in_order`: items keep their order, a row is closed when the
    next item does not fit (next-fit). `none`: one item a row. With `rising`, which is not for `best_fit`, the items are taken
    from the short ones to the long ones. Raises ValueError if an item does not fit a row.
    """
    if len(lengths) and (lengths.max() > sequence_length or lengths.min() < 1):
        item = int(np.argmax((lengths > sequence_length) | (lengths < 1)))
        raise ValueError(f"item {item} has {lengths[item]} tokens; a row holds 1 to {sequence_length}")
    if method != "best_fit":
        order = _by_length(lengths.astype(np.int64), hash64(seed, epoch)) if rising else np.arange(len(lengths))
        ends = np.arange(len(lengths) + 1) if method == "none" else _next_fit(lengths[order], sequence_length)
        return Packing(order, ends)
    assert not rising, "best-fit puts short items beside long ones"
    items, starts = [], [np.zeros(1, np.int64)]
    for number, first in enumerate(range(0, len(lengths), group)):
        part = lengths[first : first + group].astype(np.int64)
        order = _by_length(int(part.max()) - part, hash64(seed, epoch, number))  # falling
        bins = best_fit_decreasing(part[order], sequence_length)
        items.append(first + order[_stable_argsort(bins.astype(np.uint64))])
        starts.append(first + np.cumsum(np.bincount(bins)))
    return Packing(np.concatenate(items) if items else np.empty(0, np.int64), np.concatenate(starts))


def _by_length(lengths: Array, key: int) -> Array:
    """Items by rising length, those of equal length in a random order that belongs to `key`."""
    random_bits = 64 - int(lengths.max(initial=0)).bit_length() - len(lengths).bit_length()
    # Raw bits, because numpy promises their stability across versions and not that of Generator's methods.
    random = np.random.Philox(key=key).random_raw(len(lengths)) >> np.uint64(64 - random_bits)
    return _stable_argsort(lengths.astype(np.uint64) << np.uint64(random_bits) | random)


def _stable_argsort(keys: npt.NDArray[np.uint64]) -> Array:
    """`np.argsort(keys, kind="stable")` for keys that leave len(keys).bit_length() bits free.

    The item's number becomes the lower part of the key: sorting plain integers is several times as fast as an argsort.
    """
    bits = np.uint64(len(keys).bit_length())
    numbered = keys << bits | np.arange(len(keys), dtype=np.uint64)
    numbered.sort()
    return (numbered & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def best_fit_decreasing(lengths: Array, capacity: int) -> Array:
    """Bin of each item; `lengths` falls and lies in [1, capacity]. In C++ where the extension is built."""
    if _native_best_fit is not None:
        bins: Array = _native_best_fit(lengths, capacity)
        return bins
    return best_fit_decreasing_reference(lengths, capacity)


def best_fit_decreasing_reference(lengths: Array, capacity: int) -> Array:
    """What csrc/packing.cpp computes: the fullest bin that still takes the item, the latest to get there among equals."""
    stacks: dict[int, list[int]] = {}  # bins by their room; full bins are in none
    rooms: list[int] = []  # sorted keys of `stacks`
    bins = 0
    result = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths.tolist()):
        best = bisect.bisect_left(rooms, length)
        if best == len(rooms):
            room, bin_ = capacity, bins
            bins += 1
        else:
            room = rooms[best]
            bin_ = stacks[room].pop()
            if not stacks[room]:
                del stacks[room], rooms[best]
        result[item] = bin_
        room -= length
        if room:
            if room not in stacks:
                bisect.insort(rooms, room)
                stacks[room] = []
            stacks[room].append(bin_)
    return result


def _next_fit(lengths: npt.NDArray[Any], capacity: int) -> Array:
    """First item of every row, then the number of items."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = [0]
    while starts[-1] < len(lengths):
        used = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, used + capacity, side="right")))
    return np.asarray(starts, np.int64)
