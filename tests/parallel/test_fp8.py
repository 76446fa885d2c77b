"""Layers that multiply in 8 bits, on one and two ranks, against products made in float64 of the same 8-bit numbers.

torch's GEMM for 8-bit operands runs on CPUs too, so this is the path that a GPU takes, but for its kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.config import ParallelConfig
from megatron_llm.ops.fp8 import quantize
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import (
    ColumnParallelLinear,
    OutputShard,
    RowParallelLinear,
    balanced,
    column_parallel,
    most_of,
    multiply_in_fp8,
    row_parallel,
    sharded_bias,
    sharded_weight,
)
from megatron_llm.parallel.lora import ColumnLora, RowLora
from megatron_llm.parallel.weight_grad import WeightGradients
from tests.ranks import run_ranks

HIDDEN, TOKENS, RANK, SCALE = 48, 12, 4, 1.5
SIDES = {"a": 64, "b": 96}
CPU = torch.device("cpu")


def _random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


BLOCK = {
    f"{side}.{name}": _random(number * 8 + place, *shape, scale=shape[-1] ** -0.5)
    for number, (side, size) in enumerate(SIDES.items())
    for place, (name, shape) in enumerate(
        {
            "up.weight": (size, HIDDEN),
            "up.bias": (size,),
            "down.weight": (HIDDEN, size),
            "down.bias": (HIDDEN,),
            "up.lora_a.weight": (RANK, HIDDEN),
            "up.lora_b.weight": (size, RANK),
            "down.lora_a.weight": (RANK, size),
            "down.lora_b.weight": (HIDDEN, RANK),
        }.items()
    )
}


def _fill(parameter: nn.Parameter) -> None:
    for part in parameter.shard.parts:  # type: ignore[attr-defined]
        for local, logical in part.pairs:
            parameter.data[local.slices] = BLOCK[part.name][logical.slices]


def _block(world: int, sequence_parallel: bool, mode: str, narrow: bool = True, adapters: bool = False) -> dict[str, Any]:
    """x -> both sides' up, a function of each, the sum of both sides' down; all with biases, and with adapters if they say so."""
    tp = Grid.build(ParallelConfig(tensor_parallel=world), 1).tp
    partial = sequence_parallel and world > 1
    ups, downs = [], []
    for side, size in SIDES.items():
        shards = [OutputShard.of(f"{side}.up.weight", size, balanced(size, tp), most_of(size, tp))]
        weight, bias = sharded_weight(HIDDEN, shards, torch.bfloat16, CPU), sharded_bias(shards, torch.bfloat16, CPU)
        ups.append(ColumnParallelLinear(weight, tp, bias))
        downs.append(RowParallelLinear(f"{side}.down.weight", size, HIDDEN, tp, torch.bfloat16, CPU, bias=True, partial=partial))
    linears = [*ups, *downs]
    if narrow:
        multiply_in_fp8(linears, "torch")
    if adapters:
        targets = frozenset(f"{side}.{kind}.weight" for side in SIDES for kind in ("up", "down"))
        for up, down in zip(ups, downs, strict=True):
            up.lora = ColumnLora.of(up.weight, tp, targets, RANK, SCALE)
            down.lora = RowLora.of(down.weight, tp, targets, RANK, SCALE)
    parameters = [*nn.ModuleList(linears).parameters()]
    for parameter in parameters:
        _fill(parameter)
        parameter.requires_grad_(not adapters or "lora" in parameter.shard.parts[0].name)  # type: ignore[attr-defined]
        if mode != "autograd" and parameter.requires_grad:
            parameter.main_grad = torch.ones(parameter.shape)  # type: ignore[attr-defined]
    queue = WeightGradients(linears) if mode == "split" else None
    x, dy = _random(40, TOKENS, HIDDEN), _random(41, TOKENS, HIDDEN)
    if sequence_parallel:
        x, dy = x.chunk(world)[tp.rank], dy.chunk(world)[tp.rank]
    x.requires_grad_()
    a, b = column_parallel(x, ups, sequence_parallel)
    y = row_parallel([a.relu(), (-b).relu()], downs, sequence_parallel)
    if queue is None:
        y.backward(dy)
    else:
        queue.begin_step(1)
        with queue.deferred(0):
            y.backward(dy)
        queue.run(0)
        queue.end_step()
    grads: dict[str, list[tuple[Any, Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad if mode == "autograd" else getattr(parameter, "main_grad", None)
        if gradient is None:
            continue
        for part in parameter.shard.parts:  # type: ignore[attr-defined]
            copies = 1 if part.gradient_sum is not None else part.replicas
            for local, logical in part.pairs:
                value = (gradient[local.slices].double() - (0.0 if mode == "autograd" else 1.0)) / copies
                grads.setdefault(part.name, []).append((logical.slices, value))
    return {"y": y.detach(), "dx": x.grad, "grads": grads}


class _Linear(torch.autograd.Function):
    """y and dx from numbers in 8 bits, dW from those of x and dy themselves; float64 but where the engine has bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _narrow(x) @ _narrow(weight).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _narrow(dy) @ _narrow(weight.t()).t(), dy.t() @ x


class _Round(torch.autograd.Function):
    """To bfloat16, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().double()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.bfloat16().double()


def _narrow(x: Tensor) -> Tensor:
    values, inverse = quantize(x)
    return values.double() * inverse.double()


def _expected(narrow: bool, adapters: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(y, dx, gradients) in float64."""
    whole = {name: tensor.double().requires_grad_() for name, tensor in BLOCK.items()}
    x = _random(40, TOKENS, HIDDEN).double().requires_grad_()

    def linear(x: Tensor, name: str) -> Tensor:
        product = _Linear.apply if narrow else functional.linear
        y = product(x, whole[f"{name}.weight"]) + whole[f"{name}.bias"]
        if adapters:
            y = y + SCALE * (x @ whole[f"{name}.lora_a.weight"].t()) @ whole[f"{name}.lora_b.weight"].t()
        return y

    rounded = _Round.apply
    a, b = rounded(linear(x, "a.up")), rounded(linear(x, "b.up"))
    y = linear(rounded(a.relu()), "a.down") + linear(rounded((-b).relu()), "b.down")
    y.backward(_random(41, TOKENS, HIDDEN).double())
    assert x.grad is not None
    trained = {name: tensor.grad for name, tensor in whole.items() if tensor.grad is not None and adapters == ("lora" in name)}
    return y.detach(), x.grad, trained


def _off(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


NEAR = {False: 0.006, True: 0.02}
"""Without and with adapters: roundings to bfloat16, of which with adapters there are more than in the oracle; some of them move
the number in 8 bits that is made of theirs to the next.
"""


@pytest.mark.parametrize(
    ("world", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["one", "plain", "sequence parallel"]
)
@pytest.mark.parametrize(
    ("mode", "adapters"), [("autograd", False), ("main_grad", False), ("split", False), ("split", True)], ids=str
)
def test_products_are_those_of_8_bit_numbers_in_any_layout(
    world: int, sequence_parallel: bool, mode: str, adapters: bool
) -> None:
    results = run_ranks(world, _block, world, sequence_parallel, mode, True, adapters)
    y, dx, gradients = _expected(True, adapters)
    for rank, result in enumerate(results):
        for actual, expected in ((result["y"], y), (result["dx"], dx)):
            assert _off(actual, expected.chunk(world)[rank] if sequence_parallel else expected) < NEAR[adapters]
    assert gradients.keys() == {name for result in results for name in result["grads"]}
    for name, expected in gradients.items():
        total = torch.zeros_like(expected)
        for result in results:
            for place, value in result["grads"].get(name, []):
                total[place] += value
        assert _off(total, expected) < NEAR[adapters], name


@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
def test_8_bits_are_what_makes_the_difference(adapters: bool) -> None:
    """The oracle above tells them from bfloat16: either way to multiply is near its own, and far from the other."""
    (narrow,), (wide,) = (run_ranks(1, _block, 1, False, "main_grad", is_narrow, adapters) for is_narrow in (True, False))
    in_8_bits, exact = _expected(True, adapters), _expected(False, adapters)
    for place, name in enumerate(("y", "dx")):
        assert _off(wide[name], exact[place]) < NEAR[adapters] < 0.025 < _off(narrow[name], exact[place]) < 0.2, name
        assert _off(wide[name], in_8_bits[place]) > 0.025, name


def test_deferred_gradients_are_the_same_to_the_bit() -> None:
    (at_once,), (split,) = (run_ranks(1, _block, 1, False, mode) for mode in ("main_grad", "split"))
    for name, pieces in at_once["grads"].items():
        for (_, value), (_, later) in zip(pieces, split["grads"][name], strict=True):
            assert torch.equal(value, later), name
