"""Which combinations of a large product are run how often.

A layout, a schedule and a decoder meet in hundreds of ways, and a bug seldom needs one exact way of them. `make test-slow`
takes a fixed part in which each value is met, `make test-exhaustive` the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_one_in(n: int, cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: the first and every n-th after it are slow tests, the others exhaustive ones.

    Raises ValueError if a value of some parameter would be in no slow test: of a product, n should share no factor with the
    lengths of its inner axes.
    """
    cases = list(cases)
    for place, values in enumerate(zip(*cases, strict=True)):
        if missed := set(values) - set(values[::n]):
            raise ValueError(f"of parameter {place}, one in {n} cases never meets {sorted(map(str, missed))}")
    return [pytest.param(*case, marks=pytest.mark.exhaustive if i % n else pytest.mark.slow) for i, case in enumerate(cases)]
