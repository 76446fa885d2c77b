"""The learning rate at points computed by hand, and without jumps."""

from __future__ import annotations

import math

import pytest

from megatron_llm.config import LrScheduleConfig
from megatron_llm.optim.lr_schedule import learning_rate


def _rates(kind: str, updates: list[int], steps: int = 30, peak: float = 2.0, **fields: float) -> list[float]:
    schedule = LrScheduleConfig(kind=kind, **fields)  # type: ignore[arg-type]
    return [learning_rate(update, peak, schedule, steps) for update in updates]


@pytest.mark.parametrize(
    ("fields", "updates", "expected"),
    [
        # 10 updates up, 20 down from 2.0 to 0.4: half-way 1.2, a quarter of the cosine 1.2 + 0.8 cos(pi / 4)
        (
            {"warmup_steps": 10, "min_lr": 0.4},
            [1, 5, 10, 15, 20, 25, 30, 31, 99],
            [0.2, 1.0, 2.0, 1.2 + 0.8 * math.sqrt(0.5), 1.2, 1.2 - 0.8 * math.sqrt(0.5), 0.4, 0.4, 0.4],
        ),
        # no warm-up: the first update is already on the cosine, 1 / 30 of the way
        ({"warmup_steps": 0}, [1, 10, 15, 20, 30], [1 + math.cos(math.pi / 30), 1.5, 1.0, 0.5, 0.0]),
        # the decay ends before the run, and after it
        ({"warmup_steps": 2, "decay_steps": 6, "min_lr": 1.0}, [2, 4, 6, 7, 30], [2.0, 1.5, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 0, "decay_steps": 60}, [20, 30], [1.5, 1.0]),
        # warm-up to the very end
        ({"warmup_steps": 30, "min_lr": 0.4}, [15, 30], [1.0, 2.0]),
    ],
)
def test_cosine_by_hand(fields: dict[str, float], updates: list[int], expected: list[float]) -> None:
    assert _rates("cosine", updates, **fields) == pytest.approx(expected, abs=1e-12)


def test_constant_by_hand() -> None:
    assert _rates("constant", [1, 2, 4, 5, 99], warmup_steps=4, min_lr=0.5) == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert _rates("constant", [1, 99]) == [2.0, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_rate_has_no_jumps_and_one_peak(kind: str, warmup: int) -> None:
    rates = _rates(kind, list(range(1, 1201)), steps=1000, peak=1.0, warmup_steps=warmup, min_lr=0.1)
    assert max(abs(a - b) for a, b in zip(rates[:-1], rates[1:], strict=True)) <= 0.01 + 1e-12
    peak = max(warmup, 1)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak - 1 :] == sorted(rates[peak - 1 :], reverse=True)
    assert rates[peak - 1] == pytest.approx(1.0, abs=1e-5)
    assert rates[999] == rates[-1] == (pytest.approx(0.1) if kind == "cosine" else 1.0)
