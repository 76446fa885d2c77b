"""Which combinations of a large product are run how often.

A layout, a schedule and a decoder meet in hundreds of ways, and a bug seldom needs one exact way of them. `make test-slow`
takes a fixed part, `make test-exhaustive` the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
    return [_param(case, index % n == 0) for index, case in enumerate(cases)]


def slow_among(chosen: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`: those that are chosen are slow tests, the others exhaustive ones.

    Raises ValueError if one that is chosen is not there.
    """
    values = list(values)
    if missing := [value for value in chosen if value not in values]:
        raise ValueError(f"{missing} are not among {values}")
    return [_param((value,), value in chosen) for value in values]


def _param(case: tuple[Any, ...], slow: bool) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow if slow else pytest.mark.exhaustive)
