"""The factor on float16 losses moves as torch's GradScaler moves its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.config import PrecisionConfig
from megatron_llm.optim.loss_scale import INITIAL_LOSS_SCALE, loss_scale, next_loss_scale


def scales_of_torch(finite: list[bool], window: int) -> list[float]:
    """What GradScaler multiplies the loss of every step with, when the gradients of some overflow."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_LOSS_SCALE, growth_interval=window)
    scales = []
    for good in finite:
        weight.grad = None
        loss = scaler.scale((weight * (1.0 if good else torch.inf)).sum())
        scales.append(scaler.get_scale())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
    return scales


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5))
def test_the_scales_are_those_of_grad_scaler(finite: list[bool], window: int) -> None:
    scale, in_a_row, scales = INITIAL_LOSS_SCALE, 0, []
    for good in finite:
        scales.append(scale)
        scale, in_a_row = next_loss_scale(scale, in_a_row, good, window)
    assert scales == scales_of_torch(finite, window)


def test_it_falls_below_one_but_never_to_zero() -> None:
    scale, seen = INITIAL_LOSS_SCALE, []
    for _ in range(2000):
        scale, _ = next_loss_scale(scale, 0, False, 1000)
        seen.append(scale)
    assert 0.5 in seen and seen[-1] == 2.0**-24


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"compute": "float16"}, 64.0),
        ({"compute": "float16", "loss_scale": 8.0}, 8.0),
        ({"compute": "bfloat16", "loss_scale": 8.0}, 1.0),
        ({"compute": "float32"}, 1.0),
    ],
)
def test_only_float16_is_scaled(settings: dict, expected: float) -> None:
    assert loss_scale(PrecisionConfig(**settings), 64.0) == expected
