"""What holds for every update: its formula, and the same bits however a run is cut, chunked or spread over threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.ops import chunks
from megatron_llm.ops.adamw import adamw_
from megatron_llm.ops.lion import lion_
from megatron_llm.ops.rounding import StochasticRounding
from megatron_llm.ops.sgd import sgd_

SIZE = 5003
UPDATES: dict[str, tuple[Callable[..., None], int, dict[str, Any]]] = {
    "adamw": (adamw_, 2, {"update": 3, "lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
    "lion": (lion_, 1, {"lr": 0.03, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "sgd": (sgd_, 1, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
}
# dtype of weights and gradient, of moments, of the weights that are computed with
DTYPES = {
    "float64": (torch.float64, torch.float64, None),
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.float32, torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float32, torch.float16),
    "bfloat16 moments": (torch.float32, torch.bfloat16, torch.bfloat16),
    "bfloat16 moments, float64": (torch.float64, torch.bfloat16, None),
}


class _Run:
    """Weights, gradient, moments and out of one run of elements, and how to update a slice of it."""

    def __init__(self, update: str, dtypes: str, size: int = SIZE, device: str = "cpu"):
        self.function, moments, self.settings = UPDATES[update]
        wide, narrow, out = DTYPES[dtypes]
        generator = torch.Generator().manual_seed(1)
        self.weights, self.gradient, *self.moments = (
            torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
            for dtype in (wide, wide, *[narrow] * moments)
        )
        self.moments[-1].abs_()  # AdamW's second
        self.out = None if out is None else torch.zeros(size, dtype=out, device=device)
        self.rounding = StochasticRounding(7, 1000) if narrow is torch.bfloat16 else None

    def update(self, start: int = 0, stop: int = SIZE, scale: float = 0.3, **other: Any) -> None:
        at = slice(start, stop)
        self.function(
            self.weights[at],
            self.gradient[at],
            *(moment[at] for moment in self.moments),
            out=None if self.out is None else self.out[at],
            scale=scale,
            rounding=self.rounding and replace(self.rounding, start=self.rounding.start + start),
            **self.settings | other,
        )

    @property
    def result(self) -> list[Tensor]:
        return [self.weights, *self.moments, *([] if self.out is None else [self.out])]


def _assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_any_cut_and_any_chunk_give_the_same_bits(update: str, dtypes: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cuts of one element, and at odd offsets, where torch's vectorized kernels end in scalar code."""
    whole = _Run(update, dtypes, device=device)
    whole.update()
    generator = random.Random(0)
    for pieces in (2, 40, 1000):
        cuts = [0, *sorted(generator.sample(range(1, SIZE), pieces - 1)), SIZE]
        cut = _Run(update, dtypes, device=device)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            cut.update(start, stop)
        _assert_same_bits(cut.result, whole.result)
    for chunk in (1, 7, 64, 1001, 4096):
        monkeypatch.setitem(chunks.CHUNK_ELEMENTS, device, chunk)
        chunked = _Run(update, dtypes, device=device)
        chunked.update()
        _assert_same_bits(chunked.result, whole.result)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("update", UPDATES)
def test_a_gpu_updates_as_a_cpu_does(update: str, device: str) -> None:
    runs = [_Run(update, "float64", device=device) for device in ("cpu", device)]
    for run in runs:
        run.update()
    torch.testing.assert_close(*(torch.stack([x.cpu() for x in run.result]) for run in runs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 moments"])
@pytest.mark.parametrize("update", UPDATES)
def test_any_number_of_threads_gives_the_same_bits(update: str, dtypes: str) -> None:
    """Of a run long enough for torch to use them."""
    size = 300_007
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            run = _Run(update, dtypes, size)
            run.update(stop=size)
            results.append(run.result)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        _assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtypes", ["bfloat16", "float16"])
@pytest.mark.parametrize("update", UPDATES)
def test_out_gets_the_rounded_weights(update: str, dtypes: str) -> None:
    run, master = _Run(update, dtypes), _Run(update, "float32")
    run.update()
    master.update()
    assert run.out is not None and torch.equal(run.weights, master.weights)
    assert torch.equal(run.out, run.weights.to(run.out.dtype)) and not torch.equal(run.out.float(), run.weights)


@pytest.mark.parametrize("update", UPDATES)
def test_bfloat16_moments_are_those_of_float32_rounded_up_or_down(update: str) -> None:
    """The weights move by the unrounded moments; and every rounding is to one of the two neighbours, each taken at times."""
    narrow = _Run(update, "bfloat16 moments")
    wide = _Run(update, "float32")
    wide.moments = [moment.float() for moment in narrow.moments]
    narrow.update()
    wide.update()
    assert torch.equal(narrow.weights, wide.weights)
    errors = []
    for a, b in zip(narrow.moments, wide.moments, strict=True):
        unit = torch.ldexp(torch.ones_like(b), torch.frexp(b).exponent - 8)
        error = (a.float() - b) / unit
        assert a.dtype is torch.bfloat16 and (error.abs() < 1).all() and (error > 0.5).any() and (error < -0.5).any()
        assert abs(error.mean()) < 5 * 0.41 / SIZE**0.5  # standard deviation of one rounding: sqrt(1/6)
        errors.append(error * b.sign())  # bits decide about magnitudes
    if len(errors) == 2:
        assert abs(torch.corrcoef(torch.stack(errors))[0, 1]) < 5 / SIZE**0.5


@pytest.mark.parametrize("update", UPDATES)
def test_moments_and_rounding_must_fit(update: str) -> None:
    for dtypes, rounding in (("float32", StochasticRounding(1, 0)), ("bfloat16 moments", None)):
        run = _Run(update, dtypes)
        run.rounding = rounding
        with pytest.raises(ValueError, match="bfloat16 moments need a StochasticRounding"):
            run.update()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum: float) -> None:
    run = _Run("sgd", "float64")
    run.moments[0].zero_()
    reference = run.weights.clone().requires_grad_()
    optimizer = torch.optim.SGD([reference], lr=0.03, momentum=momentum)
    for step in range(1, 6):
        run.gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        reference.grad = 0.3 * run.gradient
        optimizer.param_groups[0]["lr"] = 0.03 / step
        optimizer.step()
        run.update(momentum=momentum, lr=0.03 / step, weight_decay=0.0)
    torch.testing.assert_close(run.weights, reference.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("update", ["lion", "sgd"])
def test_formulas_in_float64(update: str) -> None:
    """Written out, with weight decay; in float32 within its roundings."""
    exact, narrow = _Run(update, "float64"), _Run(update, "float32")
    weights, m = exact.weights.clone(), exact.moments[0].clone()
    for step in range(5):
        gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        g = 0.3 * gradient
        if update == "lion":
            weights = weights * (1 - 0.03 * 0.1) - 0.03 * torch.sign(0.9 * m + (1 - 0.9) * g)
            m = 0.99 * m + (1 - 0.99) * g
        else:
            m = 0.9 * m + g
            weights = weights * (1 - 0.03 * 0.1) - 0.03 * m
        exact.gradient, narrow.gradient = gradient.clone(), gradient.float()
        exact.update()
        narrow.update()
    for run, tolerance in ((exact, 1e-13), (narrow, 2e-6)):
        torch.testing.assert_close(run.weights.double(), weights, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run.moments[0].double(), m, rtol=tolerance, atol=tolerance)


def test_lion_without_gradient_and_momentum_only_decays() -> None:
    weights, zeros = torch.ones(3), torch.zeros(3)
    lion_(weights, zeros, zeros.clone(), out=None, scale=1.0, lr=0.5, betas=(0.9, 0.99), weight_decay=0.1, rounding=None)
    assert weights.tolist() == pytest.approx([0.95] * 3)
