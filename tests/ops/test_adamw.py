"""AdamW on flat runs against torch.optim.AdamW on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.adamw import adamw_
from megatron_llm.ops.rounding import StochasticRounding

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.0}
PLAIN: dict[str, Any] = {"out": None, "scale": 1.0, "update": 1, "rounding": None}


@pytest.mark.parametrize("size", [1, 5, 64, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 7e-6])
def test_updates_equal_torch(dtype: torch.dtype, weight_decay: float, scale: float, size: int) -> None:
    """Several updates, the rate changing, of gradients that still carry a factor; moments too."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(size, generator=generator, dtype=dtype)
    m, v = torch.zeros_like(weights), torch.zeros_like(weights)
    reference = weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False)
    for update in range(1, 6):
        rate = 0.03 / update
        gradient = torch.randn(size, generator=generator, dtype=dtype)
        reference.grad = gradient * scale
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        settings = {"lr": rate, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
        adamw_(weights, gradient, m, v, out=None, scale=scale, update=update, rounding=None, **settings)
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-13, "atol": 1e-14}
    state = optimizer.state[reference]
    torch.testing.assert_close(weights, reference.detach(), **tolerance)
    torch.testing.assert_close(m / scale, state["exp_avg"] / scale, **tolerance)
    torch.testing.assert_close(v / scale**2, state["exp_avg_sq"] / scale**2, **tolerance)


def test_update_number_sets_the_bias_correction() -> None:
    """A first update moves by the rate whatever the gradient; a resumed run passes its own number and moves less."""
    moved = {}
    for update in (1, 1000):
        weight, m, v = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        adamw_(weight, torch.full((1,), 1e-3), m, v, **SETTINGS, **PLAIN | {"update": update})
        moved[update] = -weight.item()
    assert moved[1] == pytest.approx(0.1, rel=1e-5)
    assert moved[1000] == pytest.approx(0.1 * 0.1 / 0.01**0.5, rel=1e-3)


def test_views_of_flat_buffers_are_updated_in_place_and_nothing_else() -> None:
    flat = torch.ones(200)
    m, v = torch.zeros(101), torch.zeros(101)
    adamw_(flat[3:104], torch.ones(101), m, v, **SETTINGS | {"lr": 0.5}, **PLAIN)
    assert flat.tolist() == pytest.approx([1] * 3 + [0.5] * 101 + [1] * 96)
    adamw_(flat[:0], flat[:0], m[:0], v[:0], **SETTINGS, **PLAIN)


def _second_moment(dtype: torch.dtype, stochastic: bool, updates: int = 1500) -> Tensor:
    """v of 4096 elements after gradients that are 1 for half of the updates and 3 afterwards, with beta2 = 0.999."""
    size = 4096
    weights, m, v = torch.zeros(size), torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    wide_m, wide_v = torch.zeros(size), torch.zeros(size)
    for update in range(1, updates + 1):
        gradient = torch.full((size,), 1.0 if update <= updates // 2 else 3.0)
        arguments = SETTINGS | PLAIN | {"update": update, "betas": (0.9, 0.999)}
        if stochastic:
            adamw_(weights, gradient, m, v, **arguments | {"rounding": StochasticRounding(update, 0)})
        else:
            adamw_(weights, gradient, wide_m, wide_v, **arguments)
            v.copy_(wide_v)
            wide_v.copy_(v)
    return v.double()


def test_a_bfloat16_second_moment_follows_float32_where_rounding_to_nearest_freezes_it() -> None:
    expected = _second_moment(torch.float32, stochastic=False)[0].item()
    frozen = _second_moment(torch.bfloat16, stochastic=False)[0].item()
    v = _second_moment(torch.bfloat16, stochastic=True)
    assert frozen < 0.6 * expected
    assert v.mean().item() == pytest.approx(expected, rel=0.01)
    assert v.std().item() < 0.06 * expected  # each follows, not only their mean


def test_training_with_bfloat16_moments_reaches_the_loss_of_float32() -> None:
    """Noisy logistic regression at a fixed point of view: the loss over all examples, after 400 updates on batches of 32."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 50, generator=generator)
    labels = (inputs @ torch.randn(50, generator=generator) + torch.randn(4096, generator=generator) > 0).float()

    def train(dtype: torch.dtype) -> float:
        weights, m, v = torch.zeros(50), torch.zeros(50, dtype=dtype), torch.zeros(50, dtype=dtype)
        for update in range(1, 401):
            rows = torch.randint(0, 4096, (32,), generator=torch.Generator().manual_seed(update))
            gradient = inputs[rows].T @ (torch.sigmoid(inputs[rows] @ weights) - labels[rows])
            rounding = StochasticRounding(update, 0) if dtype is torch.bfloat16 else None
            settings = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
            adamw_(weights, gradient, m, v, out=None, scale=1 / 32, update=update, rounding=rounding, **settings)
        return torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights, labels).item()

    assert train(torch.float32) < 0.25  # from 0.69
    assert train(torch.bfloat16) == pytest.approx(train(torch.float32), rel=0.01)
