"""A part of a product that misses a value is refused; every case has one mark."""

from __future__ import annotations

from itertools import product

import pytest

from tests.tiers import slow_among, slow_one_in


def _tiers(params: list[object]) -> list[str]:
    return [mark.name for param in params for mark in param.marks]  # type: ignore[attr-defined]


def test_each_value_is_met_or_the_part_is_refused() -> None:
    cases = list(product("ab", "xy"))
    assert _tiers(slow_one_in(3, cases)) == ["slow", "exhaustive", "exhaustive", "slow"]
    assert _tiers(slow_one_in(1, cases)) == ["slow"] * 4
    with pytest.raises(ValueError, match=r"of parameter 1, one in 2 cases never meets \['y'\]"):
        slow_one_in(2, cases)


def test_those_that_are_chosen_are_slow() -> None:
    assert _tiers(slow_among("b", "abc")) == ["exhaustive", "slow", "exhaustive"]
    with pytest.raises(ValueError, match="are not among"):
        slow_among(("d",), "abc")
