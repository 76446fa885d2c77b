"""AdamW on slices against torch.optim.AdamW on whole tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_llm.ops.adamw import adamw_

SIZES = (1, 5, 64, 1003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 7e-6])
def test_updates_equal_torch(dtype: torch.dtype, weight_decay: float, scale: float) -> None:
    """Several updates, the rate changing, of gradients that still carry a factor; moments too."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
    m, v = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    reference = [weight.clone().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(reference, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False)
    for update in range(1, 6):
        rate = 0.03 / update
        gradients = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient * scale
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        adamw_(
            weights,
            gradients,
            m,
            v,
            scale=scale,
            update=update,
            lr=rate,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=weight_decay,
        )
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-13, "atol": 1e-14}
    for weight, first, second, parameter in zip(weights, m, v, reference, strict=True):
        state = optimizer.state[parameter]
        torch.testing.assert_close(weight, parameter.detach(), **tolerance)
        torch.testing.assert_close(first / scale, state["exp_avg"] / scale, **tolerance)
        torch.testing.assert_close(second / scale**2, state["exp_avg_sq"] / scale**2, **tolerance)


def test_update_number_sets_the_bias_correction() -> None:
    """A first update moves by the rate whatever the gradient; a resumed run passes its own number and moves less."""
    moved = {}
    for update in (1, 1000):
        weight, m, v = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        adamw_(
            [weight], [torch.full((1,), 1e-3)], [m], [v],
            scale=1.0, update=update, lr=0.1, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.0,
        )  # fmt: skip
        moved[update] = -weight.item()
    assert moved[1] == pytest.approx(0.1, rel=1e-5)
    assert moved[1000] == pytest.approx(0.1 * 0.1 / 0.01**0.5, rel=1e-3)


def test_views_of_flat_buffers_are_updated_in_place_and_nothing_else() -> None:
    flat = torch.ones(10)
    m, v = torch.zeros(4), torch.zeros(4)
    adamw_(
        [flat[3:7]], [torch.ones(4)], [m], [v],
        scale=1.0, update=1, lr=0.5, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0,
    )  # fmt: skip
    assert flat.tolist() == pytest.approx([1] * 3 + [0.5] * 4 + [1] * 3)
    adamw_([], [], [], [], scale=1.0, update=1, lr=0.5, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
