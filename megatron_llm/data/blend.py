"""Which source the next row comes from: a short periodic table that keeps every prefix within one row of its share.

Weights are whole numbers of at most 65,536 in all, or rounded to k/65536. Within a period, rows are dealt by Tijdeman's rule for
the chairman assignment problem (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980): with s sources,
after any number t of rows source j has given at most 1 - 1/(2s - 2) rows more or less than share_j * t. Called by `stream.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

RESOLUTION = 1 << 16


class Blend:
    """Deals the rows of a stream to its sources. `blend(row)` is O(1).

    Attributes:
        counts: rows of each source in one period; counts[j] / period is source j's exact share.
        period: rows after which the table repeats, at most 65,536.
    """

    def __init__(self, weights: Sequence[float]):
        """`weights`: positive, any scale. Raises ValueError beyond 65,536 sources."""
        counts = whole_weights(weights)
        common = math.gcd(*counts)
        self.counts = [count // common for count in counts]
        self.period = sum(self.counts)
        table = tijdeman(self.counts)
        seen = [0] * len(self.counts)
        numbers = np.empty(self.period, np.int32)
        for index, source in enumerate(table):
            numbers[index] = seen[source]
            seen[source] += 1
        assert seen == self.counts
        self._sources, self._numbers = np.asarray(table, np.int32), numbers

    def __call__(self, row: int) -> tuple[int, int]:
        """(source, number of the row within that source's own stream) of a row of the blended stream."""
        turn, index = divmod(row, self.period)
        source = int(self._sources[index])
        return source, turn * self.counts[source] + int(self._numbers[index])


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The weights as integers of sum at most RESOLUTION: themselves where they are, so that nothing is rounded."""
    if all(weight > 0 and float(weight).is_integer() for weight in weights) and sum(weights) <= RESOLUTION:
        return [int(weight) for weight in weights]
    return round_weights(weights)


def round_weights(weights: Sequence[float]) -> list[int]:
    """Integers of sum RESOLUTION near the weights' shares, by largest remainder; none is 0, so no source is silently lost."""
    if len(weights) > RESOLUTION:
        raise ValueError(f"{len(weights)} sources; a blend has at most {RESOLUTION}: merge some")
    assert weights and all(weight > 0 and math.isfinite(weight) for weight in weights)
    total = math.fsum(weights)
    exact = [weight / total * RESOLUTION for weight in weights]
    counts = [max(1, math.floor(share)) for share in exact]
    # Raising tiny shares to 1 can overshoot: then take from whoever has most above its share.
    while (missing := RESOLUTION - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        order = sorted(range(len(counts)), key=lambda j: (step * (counts[j] - exact[j]), j))
        for j in [j for j in order if counts[j] + step > 0][: abs(missing)]:
            counts[j] += step
    return counts


def tijdeman(counts: Sequence[int]) -> list[int]:
    """The source of each of sum(counts) rows, source j appearing counts[j] times, spread as evenly as can be.

    Tijdeman's rule as earliest-deadline-first scheduling: with W rows in all, margin = 1 - 1/(2s - 2), the (x+1)-th row
    of source j may come from row t (counted from 1) on as soon as counts_j t / W - x >= 1 - margin, and must come while
    counts_j (t - 1) / W - x <= margin still holds for the row before. Integers throughout, so it is exact.
    """
    if len(counts) == 1:
        return [0] * counts[0]
    total, scale = sum(counts), 2 * len(counts) - 2

    def job(source: int, number: int) -> tuple[int, int, int, int]:
        """(first row it may take, last row it may take, source, number)."""
        slots = counts[source] * scale
        release = -(-total * (number * scale + 1) // slots)
        deadline = total * (number * scale + scale - 1) // slots + 1
        return release, deadline, source, number

    waiting = [job(source, 0) for source in range(len(counts))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    table = []
    for row in range(1, total + 1):
        while waiting and waiting[0][0] <= row:
            _, deadline, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, source, number))
        deadline, source, number = heapq.heappop(ready)
        assert row <= deadline, "Tijdeman's theorem: a schedule that meets all deadlines exists"
        table.append(source)
        if number + 1 < counts[source]:
            heapq.heappush(waiting, job(source, number + 1))
    return table
