"""Updates in Triton: the torch path's bits where that rounds once an operation, else its values, and those of float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig, PrecisionConfig
from megatron_llm.ops.adamw import adamw_
from megatron_llm.ops.lion import lion_
from megatron_llm.ops.rounding import RoundingBits, StochasticRounding, round_into
from megatron_llm.ops.sgd import sgd_
from megatron_llm.ops.triton import update as update_module
from megatron_llm.ops.triton.update import BLOCK, update
from megatron_llm.optim.zero1 import ZeroOptimizer
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from tests.ops.triton.common import DEVICE, assert_near, randn
from tests.ops.triton.far import run_last_programs, sparse

UPDATES: dict[str, tuple[Callable[..., None], int, dict[str, Any]]] = {
    "adamw": (adamw_, 2, {"update": 3, "lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
    "lion": (lion_, 1, {"lr": 0.03, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "sgd": (sgd_, 1, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
}
NARROW = torch.bfloat16
# dtype of the gradient, of moments, of the weights that are computed with
DTYPES = {
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.float32, torch.float32, NARROW),
    "float16": (torch.float32, torch.float32, torch.float16),
    "bfloat16 gradient": (NARROW, torch.float32, NARROW),
    "bfloat16 moments": (torch.float32, NARROW, NARROW),
}
SIZE = BLOCK + 77


class _Run:
    """Weights, gradient, moments and out of one run of elements."""

    def __init__(self, rule: str, dtypes: str, size: int = SIZE, wide: torch.dtype = torch.float32):
        self.function, moments, self.settings = UPDATES[rule]
        gradient, moment, out = DTYPES[dtypes]
        self.weights, self.gradient = randn(size).to(wide), randn(size, dtype=gradient, seed=1)
        self.moments = [randn(size, dtype=moment, seed=2 + number, scale=0.1).abs_() for number in range(moments)]
        if wide is torch.float64:
            self.gradient, self.moments = self.gradient.to(wide), [moment.to(wide) for moment in self.moments]
            out = None
        self.out = None if out is None else torch.zeros(size, dtype=out, device=DEVICE)
        narrow = self.moments[0].dtype is NARROW
        self.rounding = StochasticRounding(7, 2**33 + 1000) if narrow else None

    def update(self, kernel: str, start: int = 0, stop: int | None = None, **other: Any) -> list[Tensor]:
        at = slice(start, len(self.weights) if stop is None else stop)
        gradient = self.gradient if kernel == "triton" else self.gradient.to(self.weights.dtype, copy=True)
        self.function(
            self.weights[at],
            gradient[at],
            *(moment[at] for moment in self.moments),
            out=None if self.out is None else self.out[at],
            scale=0.3,
            rounding=self.rounding and replace(self.rounding, start=self.rounding.start + start),
            kernel=kernel,
            **self.settings | other,
        )
        return self.result

    @property
    def result(self) -> list[Tensor]:
        return [self.weights, *self.moments, *([] if self.out is None else [self.out])]


def _assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rule", UPDATES)
def test_is_the_formula_in_float64(rule: str, dtypes: str) -> None:
    """With moments before they are rounded; out is the weights rounded, and the gradient is left as it was."""
    fused, exact = _Run(rule, dtypes), _Run(rule, dtypes, wide=torch.float64)
    gradient = fused.gradient.clone()
    fused.update("triton")
    exact.update("torch")
    assert torch.equal(fused.gradient, gradient)
    assert_near(fused.weights, exact.weights)
    if fused.out is not None:
        assert torch.equal(fused.out, fused.weights.to(fused.out.dtype))
    for moment, expected in zip(fused.moments, exact.moments, strict=True):
        assert_near(moment, expected, 2.0)  # stochastic rounding is off by a unit at most: two halves


@pytest.mark.parametrize("dtypes", ["bfloat16", "bfloat16 gradient", "bfloat16 moments"])
@pytest.mark.parametrize("rule", ["lion", "sgd"])
def test_lion_and_sgd_have_the_bits_of_torch(rule: str, dtypes: str) -> None:
    runs = [_Run(rule, dtypes), _Run(rule, dtypes)]
    _assert_same_bits(*(run.update(kernel) for run, kernel in zip(runs, ("triton", "torch"), strict=True)))


def test_adamw_is_torchs_to_a_few_units_over_many_updates() -> None:
    fused, torchs = _Run("adamw", "bfloat16", 500), _Run("adamw", "bfloat16", 500)
    for number in range(3, 23):
        gradient = randn(500, seed=number)
        for run, kernel in ((fused, "triton"), (torchs, "torch")):
            run.gradient.copy_(gradient)
            run.update(kernel, update=number)
    unit = 2.0**-23
    for name, a, b in zip(("weights", "m", "v"), fused.result, torchs.result, strict=False):
        assert ((a - b).abs() <= 16 * unit * torch.maximum(b.abs(), b.abs().mean())).all(), name
    assert fused.out is not None and torchs.out is not None
    assert (fused.out != torchs.out).float().mean() < 0.01


def _sqrt(x: Tensor) -> Tensor:
    """Rounded once, as IEEE 754 wants it. torch has MKL's on a CPU, which is off by a bit on some processors."""
    return x.double().sqrt().float()


@pytest.mark.parametrize("dtypes", ["bfloat16", "bfloat16 moments"])
def test_adamw_as_written(dtypes: str) -> None:
    """Operation by operation in torch, which rounds after each: the same bits, also of both rounded moments."""
    run = _Run("adamw", dtypes)
    w, g, m, v = run.weights.clone(), run.gradient.clone(), run.moments[0].float(), run.moments[1].float()
    g = g / torch.tensor(1 / 0.3, device=DEVICE)
    m = m + (g - m) * (1 - 0.9)
    v = v * 0.99 + (1 - 0.99) * g * g
    step, root = 0.03 / (1 - 0.9**3), (1 - 0.99**3) ** 0.5
    w = w * (1 - 0.03 * 0.1) + (-step * m) / (_sqrt(v) / torch.tensor(root, device=DEVICE) + 1e-8)
    moments = [m, v]
    if run.rounding is not None:
        moments = [torch.empty_like(moment) for moment in run.moments]
        bits = RoundingBits(run.rounding, SIZE, DEVICE).draw(0, SIZE)
        for narrow, wide, random in zip(moments, (m, v), bits, strict=True):
            round_into(narrow, wide, random)
    _assert_same_bits(run.update("triton")[:3], [w, *moments])


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 moments"])
@pytest.mark.parametrize("rule", UPDATES)
def test_any_cut_gives_the_same_bits(rule: str, dtypes: str) -> None:
    """Also cuts of one element and of none, and at odd offsets, where nothing begins at 16 bytes."""
    whole, cut = _Run(rule, dtypes), _Run(rule, dtypes)
    whole.update("triton")
    cuts = [0, 1, 1, 2, 35, 64, BLOCK - 1, SIZE]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        cut.update("triton", start, stop)
    _assert_same_bits(cut.result, whole.result)


@pytest.mark.parametrize("rule", UPDATES)
def test_nothing_outside_of_the_run_changes(rule: str) -> None:
    run, before = _Run(rule, "bfloat16"), _Run(rule, "bfloat16")
    run.update("triton", 5, 19)
    for tensor, old in zip(run.result, before.result, strict=True):
        assert torch.equal(tensor[:5], old[:5]) and torch.equal(tensor[19:], old[19:])
        assert not torch.equal(tensor[5:19], old[5:19])


def test_numbers_that_are_none_and_moments_too_large_to_round() -> None:
    """Which is which: as `round_into` has it, whose NaN stays one whatever is added."""
    special = [torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 0.0]
    runs = [_Run("sgd", "bfloat16 moments", 8), _Run("sgd", "bfloat16 moments", 8)]
    for run, kernel in zip(runs, ("triton", "torch"), strict=True):
        run.gradient.copy_(torch.tensor(special))
        run.moments[0].zero_()
        run.update(kernel)
    for a, b in zip(runs[0].result, runs[1].result, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert runs[0].moments[0][0].isnan()


@pytest.mark.parametrize("rule", UPDATES)
def test_moments_and_rounding_must_fit(rule: str) -> None:
    run = _Run(rule, "bfloat16 moments", 3)
    run.rounding = None
    with pytest.raises(ValueError, match="bfloat16 moments need a StochasticRounding"):
        run.update("triton")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a grid, only the interpreter can run a part")
def test_more_elements_than_32_bits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**31 + 5
    w, m = sparse(tmp_path / "w", size), sparse(tmp_path / "m", size)
    first, last = randn(10), randn(10, seed=1)
    w[:10], w[-10:] = first, last
    grids = run_last_programs(monkeypatch, update_module, "update_kernel", 2)
    settings = {"scale": 2.0, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "rounding": None}
    sgd_(w, w, m, out=None, kernel="triton", **settings)
    assert grids == [(-(-size // BLOCK),)]
    assert torch.equal(w[-10:], last - 0.5 * (2.0 * last)) and torch.equal(w[:10], first) and torch.equal(m[-10:], 2.0 * last)


def test_operator() -> None:
    tensors = [randn(5), randn(5, seed=1), randn(5, seed=2), randn(5, seed=3).abs_(), torch.zeros(5, dtype=NARROW, device=DEVICE)]
    factor = torch.ones((), device=DEVICE)
    for v, out in ((tensors[3], tensors[4]), (None, None)):
        rule = "sgd" if v is None else "adamw"
        arguments = (*tensors[:3], v, out, factor, rule, 0.9, 0.1, [0.9, 0.1], [0.9, 0.1], 1.0, 1e-8, None)
        torch.library.opcheck(update, arguments)


# As the optimizer calls it


def _parameters() -> list[nn.Parameter]:
    """With and without decay, one of them with two parts that begin at an odd element."""
    shapes = {"a": (7, 13), "norm": (13,), "b": (40, 31), "one": (1,)}
    parameters = []
    for number, (name, shape) in enumerate(shapes.items()):
        parameter = nn.Parameter(randn(*shape, dtype=NARROW, seed=number))
        whole = Box.full(shape)
        parts = [Part(name, shape, ((whole, whole),))]
        if name == "b":
            boxes = [Box((0, 0), (21, 31)), Box((21, 0), (19, 31))]
            parts = [Part(f"b{i}", box.shape, ((box, Box.full(box.shape)),)) for i, box in enumerate(boxes)]
        parameter.shard = ShardSpec(tuple(parts), name != "norm")  # type: ignore[attr-defined]
        parameters.append(parameter)
    return parameters


def _train(kernel: str, **settings: Any) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Three steps: (squared norms, and by kind what the optimizer keeps and the weights)."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, ema_decay=0.9, rules=[{"match": "b1", "lr_scale": 0.5}], **settings)  # type: ignore[list-item]
    parameters = _parameters()
    optimizer = ZeroOptimizer(parameters, Grid.single(), config, 200, PrecisionConfig(), kernel=kernel)
    squares = []
    for number in range(1, 4):
        optimizer.zero_gradients()
        for seed, parameter in enumerate(parameters):
            parameter.main_grad.add_(randn(*parameter.shape, seed=100 * number + seed))  # type: ignore[attr-defined]
        squares.append(optimizer.reduce_gradients().clone())
        optimizer.update(number, 0.03, 0.7)
    kept = {kind: [view.clone() for _, view in optimizer.state_pieces(kind)] for kind in optimizer.state_kinds}
    return squares, kept | {"computed with": [parameter.detach().clone() for parameter in parameters]}


@pytest.mark.parametrize("settings", [{}, {"state_dtype": "bfloat16"}], ids=["float32 state", "bfloat16 state"])
@pytest.mark.parametrize("name", UPDATES)
def test_a_step_of_zero_1_is_that_of_torch(name: str, settings: dict[str, Any]) -> None:
    expected_squares, expected = _train("torch", name=name, **settings)
    squares, kept = _train("triton", name=name, **settings)
    torch.testing.assert_close(squares, expected_squares, rtol=1e-6, atol=0)
    for kind, tensors in expected.items():
        for a, b in zip(kept[kind], tensors, strict=True):
            if name == "adamw":  # moments that differ in their last bit may be rounded to other neighbours
                unit = 2.0**-7 if NARROW in (a.dtype, kept["m"][0].dtype) else 1e-5
                torch.testing.assert_close(a, b, rtol=unit, atol=unit / 10)
            else:
                assert torch.equal(a, b), kind
