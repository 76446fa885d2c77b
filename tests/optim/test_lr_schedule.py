"""The learning rate at points computed by hand, beside the schedulers of transformers, and without jumps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_llm.config import LrScheduleConfig
from megatron_llm.optim.lr_schedule import learning_rate


def _rates(kind: str, updates: list[int], steps: int = 30, peak: float = 2.0, **fields: Any) -> list[float]:
    schedule = LrScheduleConfig(kind=kind, **fields)
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


PEAK, STEPS, WARMUP = 3e-4, 50, 7

PEERS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "constant": ({"kind": "constant"}, transformers.get_constant_schedule_with_warmup, {}),
    "linear": ({"kind": "linear"}, transformers.get_linear_schedule_with_warmup, {"num_training_steps": STEPS}),
    "cosine": ({"kind": "cosine"}, transformers.get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}),
    "cosine to a part": (
        {"kind": "cosine", "min_lr_ratio": 0.1},
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        {"num_training_steps": STEPS, "min_lr_rate": 0.1},
    ),
    "cosine to a rate": (
        {"kind": "cosine", "min_lr": 1e-5},
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        {"num_training_steps": STEPS, "min_lr": 1e-5},
    ),
    "inverse_sqrt": ({"kind": "inverse_sqrt"}, transformers.get_inverse_sqrt_schedule, {"timescale": WARMUP}),
    **{
        f"wsd {shape}": (
            {"kind": "wsd", "decay_steps": 12, "decay_shape": shape},
            transformers.get_wsd_schedule,
            {"num_training_steps": STEPS, "num_decay_steps": 12, "decay_type": shape},
        )
        for shape in ("linear", "cosine", "1-sqrt")
    },
}


@pytest.mark.parametrize("name", PEERS)
def test_rates_are_those_of_transformers(name: str) -> None:
    """Their first step has number 0 and, with a warm-up, rate 0; ours has number 1. (After its end their cosine rises again.)"""
    fields, scheduler, arguments = PEERS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    rate = scheduler(optimizer, num_warmup_steps=WARMUP, **arguments).lr_lambdas[0]
    expected = [PEAK * rate(update) for update in range(1, STEPS + 1)]
    schedule = LrScheduleConfig(warmup_steps=WARMUP, **fields)
    actual = [learning_rate(update, PEAK, schedule, STEPS) for update in range(1, STEPS + 1)]
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_wsd_by_hand() -> None:
    """Up to 2.0 in 4 updates, stable, and in the last 16 of 30 down to 0.4: at a quarter half of the way, by 1-sqrt."""
    fields = {"warmup_steps": 4, "decay_steps": 16, "min_lr": 0.4}
    assert _rates("wsd", [2, 4, 14, 18, 23, 30, 31], **fields) == pytest.approx([1.0, 2.0, 2.0, 1.2, 0.8, 0.4, 0.4])
    assert _rates("wsd", [23], **fields)[0] != pytest.approx(1.1)
    assert _rates("wsd", [18], **fields, decay_shape="linear") == pytest.approx([1.6])


def test_inverse_sqrt_has_a_floor() -> None:
    assert _rates("inverse_sqrt", [2, 4, 16, 64, 100, 1000], warmup_steps=4, min_lr=0.4) == pytest.approx(
        [1.0, 2.0, 1.0, 0.5, 0.4, 0.4]
    )


def test_a_restart_by_hand() -> None:
    """A run of 10 updates to 0.4, prolonged to 30: 4 updates from 0.4 up to 2.0, and down to 0.4 at the end."""
    fields = {"warmup_steps": 4, "min_lr": 0.4, "restart_steps": [10]}
    assert _rates("linear", [2, 4, 7, 10, 11, 12, 14, 22, 30, 31], **fields) == pytest.approx(
        [1.0, 2.0, 1.2, 0.4, 0.8, 1.2, 2.0, 1.2, 0.4, 0.4]
    )


@st.composite
def schedules(draw: st.DrawFn, restarts: bool = False) -> tuple[LrScheduleConfig, int]:
    """A schedule in steps that fits its run, and the steps of the run."""
    kind = draw(st.sampled_from(["constant", "linear", "cosine", "inverse_sqrt", "wsd"]))
    warmup = draw(st.integers(1 if kind == "inverse_sqrt" else 0, 20))
    decay = draw(st.integers(1, 30)) if kind == "wsd" else draw(st.none() | st.integers(warmup + 1, 90))
    shape = draw(st.sampled_from(["linear", "cosine", "1-sqrt"])) if kind == "wsd" else None
    lengths = draw(st.lists(st.integers(warmup + (decay or 0) + 1, 150), min_size=1, max_size=3 if restarts else 1))
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    schedule = LrScheduleConfig(
        kind=kind,
        warmup_steps=warmup,
        decay_steps=decay,
        decay_shape=shape,
        min_lr_ratio=draw(st.sampled_from([0.0, 0.1, 1.0])),
        restart_steps=ends[:-1] or None,
    )
    return schedule, ends[-1]


@settings(max_examples=150, deadline=None)
@given(case=schedules())
def test_up_and_down_once_and_between_the_bounds(case: tuple[LrScheduleConfig, int]) -> None:
    schedule, steps = case
    rates = [learning_rate(update, 1.0, schedule, steps) for update in range(1, steps + 10)]
    top = max(schedule.warmup, 1) - 1
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    least = schedule.min_lr_ratio or 0.0
    assert max(rates) <= 1.0 and min(rates[top:]) >= least - 1e-15
    if schedule.warmup:
        assert rates[top] == 1.0 and rates[0] == pytest.approx(1 / schedule.warmup)
    if schedule.kind in ("linear", "cosine", "wsd"):
        assert rates[steps - 1 :] == pytest.approx([least] * 10)
    if schedule.kind == "wsd":
        assert schedule.decay is not None
        assert set(rates[top : steps - schedule.decay]) <= {1.0} and (least == 1.0 or rates[steps - schedule.decay] < 1.0)


@settings(max_examples=100, deadline=None)
@given(case=schedules(restarts=True))
def test_between_restarts_the_schedule_is_that_of_a_run_of_its_own(case: tuple[LrScheduleConfig, int]) -> None:
    """But for the warm-up, which is a line from the rate before."""
    schedule, steps = case
    alone = schedule.model_copy(update={"restart_steps": None})
    start, before = 0, 0.0
    for end in [*schedule.restarts, steps]:
        for update in range(1, end - start + 1):
            rate = learning_rate(start + update, 1.0, schedule, steps)
            if update <= schedule.warmup:
                part = update / schedule.warmup
                assert rate == pytest.approx((1 - part) * before + part)
            else:
                assert rate == learning_rate(update, 1.0, alone, end - start)
        start, before = end, rate


@settings(max_examples=100, deadline=None)
@given(case=schedules(restarts=True), batch=st.sampled_from([1, 7, 4096]))
def test_a_schedule_in_tokens_is_the_one_in_steps_of_that_many(case: tuple[LrScheduleConfig, int], batch: int) -> None:
    schedule, steps = case
    tokens = LrScheduleConfig(
        kind=schedule.kind,
        warmup_tokens=schedule.warmup * batch or None,
        decay_tokens=schedule.decay and schedule.decay * batch,
        restart_tokens=[restart * batch for restart in schedule.restarts] or None,
        decay_shape=schedule.decay_shape,
        min_lr_ratio=schedule.min_lr_ratio,
    )
    for update in range(1, steps + 5):
        expected = learning_rate(update, 1.0, schedule, steps)
        assert learning_rate(update * batch, 1.0, tokens, steps * batch) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"warmup_steps": 3, "warmup_tokens": 5}, "warmup_steps counts steps and warmup_tokens counts tokens"),
        ({"warmup_steps": 3, "decay_tokens": 5}, "warmup_steps counts steps and decay_tokens counts tokens"),
        ({"restart_steps": [3], "decay_tokens": 5}, "restart_steps counts steps and decay_tokens counts tokens"),
        ({"min_lr": 1e-5, "min_lr_ratio": 0.1}, "both say where the rate ends"),
        ({"kind": "inverse_sqrt"}, "give warmup_steps or warmup_tokens"),
        ({"kind": "wsd", "warmup_steps": 3}, "give decay_steps or decay_tokens"),
        ({"restart_steps": [5, 5]}, "must ascend"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LrScheduleConfig(**fields)
