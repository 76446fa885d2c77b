"""Every backend of attention that is there, on a GPU, against the reference in float64: all that it claims to have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.attention import BACKENDS, Available, Case, _problem, attention, choose
from megatron_llm.ops.kernels import deterministic_algorithms
from megatron_llm.ops.scores import Scores, alibi_slopes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HEADS, KEYS = 8, 2
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.2},
    "window": {"window": 65},
    "window of one": {"window": 1},
    "soft cap": {"softcap": 1.5},
    "soft cap and window": {"softcap": 1.5, "window": 100},
    "ALiBi": {"slopes_N": True},
    "coarse ALiBi": {"slopes_N": True, "coarse": True},
}
DOCUMENTS = {  # lengths of queries, and of keys
    "one": ([512], [512]),
    "many": ([1, 64, 0, 129, 1, 1, 300, 17], [1, 64, 0, 129, 1, 1, 300, 17]),
    "cached": ([1, 1, 5, 64], [300, 1, 133, 64]),
}


def _boundaries(lengths: list[int]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def _scores(feature: str) -> Scores:
    fields = dict(FEATURES[feature])
    if fields.pop("slopes_N", False):
        fields["slopes_N"] = torch.tensor(alibi_slopes(HEADS), device="cuda")
    return Scores(**fields)


def _case(scores: Scores, dtype: torch.dtype, dim: int, deterministic: bool = False) -> Case:
    features = scores.softcap is not None, scores.slopes_N is not None, scores.coarse, scores.window is not None
    return Case(dtype, dim, *features, deterministic)


def _inputs(q_tokens: int, k_tokens: int, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k and v side by side, as layers have them, and a gradient."""
    generator = torch.Generator().manual_seed(q_tokens + dim)
    made = [torch.randn(rows, heads, dim, generator=generator) for rows, heads in ((q_tokens, HEADS), (k_tokens, 2 * KEYS))]
    q, kv = (x.to("cuda", dtype) for x in made)
    inputs = [x.detach().requires_grad_() for x in (q, *kv.split(KEYS, dim=1))]
    return inputs, torch.randn(q.shape, generator=generator).to("cuda", dtype)


def _refused(name: str, case: Case) -> str | None:
    return _problem(name, case, Available.on(torch.device("cuda", torch.cuda.current_device())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256, 100])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_a_backend_is_the_reference(name: str, feature: str, documents: str, dim: int, dtype: torch.dtype) -> None:
    """As near as rounding what is stored, and the probabilities, of numbers that are averaged: two units of the largest."""
    scores = _scores(feature)
    if problem := _refused(name, _case(scores, dtype, dim)):
        pytest.skip(problem)
    q_lens, k_lens = DOCUMENTS[documents]
    inputs, dy = _inputs(sum(q_lens), sum(k_lens), dim, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    bounds = _boundaries(q_lens), _boundaries(k_lens)
    expected = attention(*wide, *bounds, "reference", scores)
    actual = attention(*inputs, *bounds, name, scores)
    assert actual.dtype is dtype and actual.shape == expected.shape
    pairs = [(actual, expected)]
    pairs += zip(torch.autograd.grad(actual, inputs, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5 / 4}[dtype]
    for number, (ours, exact) in enumerate(pairs):
        error = (ours.double() - exact).abs().max().item()
        assert error <= 4 * unit * exact.abs().max().item(), ("output", "dq", "dk", "dv")[number]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("cudnn", "reference")])
def test_a_deterministic_backward_makes_the_same_bits(name: str, feature: str) -> None:
    scores = _scores(feature)
    if problem := _refused(name, _case(scores, torch.bfloat16, 128, True)):
        pytest.skip(problem)
    bounds = _boundaries([2000, 1, 1500, 4000])
    inputs, dy = _inputs(bounds[-1], bounds[-1], 128, torch.bfloat16)
    with deterministic_algorithms(True):
        runs = [
            torch.autograd.grad(attention(*inputs, bounds, bounds, name, scores, deterministic=True), inputs, dy)
            for _ in range(4)
        ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("feature", FEATURES)
def test_auto_keeps_no_matrix_and_does_not_wait(feature: str) -> None:
    """Saved for backward: q, k, v, the output and a number for each token and head, and lists of documents and tiles."""
    scores = _scores(feature)
    name = choose(
        "auto", _case(scores, torch.bfloat16, 128), Available.on(torch.device("cuda", torch.cuda.current_device()))
    ).name
    bounds = _boundaries([1000, 24, 3000])
    inputs, dy = _inputs(bounds[-1], bounds[-1], 128, torch.bfloat16)
    attention(*inputs, bounds, bounds, name, scores).backward(dy)  # compiled, if it has to be
    for x in inputs:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(*inputs, bounds, bounds, name, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = torch.cuda.memory_allocated() - before
    numbers = out.numel() * 2 + bounds[-1] * HEADS * 4
    assert numbers <= kept <= numbers + 64 * 1024, (name, kept, numbers)
