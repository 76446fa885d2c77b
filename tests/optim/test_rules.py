"""Rules by name, moments of other optimizers and averaged weights, beside torch's optimizers with parameter groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig
from megatron_llm.optim.rules import Rule, freeze, is_frozen, rule_for, rule_problems
from megatron_llm.optim.zero1 import ZeroOptimizer
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part, ShardSpec

NAMES = {"embedding.weight": (9, 8), "layers.0.norm.weight": (8,), "layers.1.o.weight": (8, 8)}


def _parameters() -> list[nn.Parameter]:
    """Three plain ones and a fused one of two logical tensors, 3 and 2 rows."""
    result = []
    generator = torch.Generator().manual_seed(1)
    for name, shape in NAMES.items():
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        whole = Box.full(shape)
        p.shard = ShardSpec((Part(name, shape, ((whole, whole),)),), "norm" not in name)  # type: ignore[attr-defined]
        result.append(p)
    fused = nn.Parameter(torch.randn(5, 8, generator=generator, dtype=torch.float64))
    q = Part("layers.1.q.weight", (3, 8), ((Box((0, 0), (3, 8)), Box.full((3, 8))),))
    k = Part("layers.1.k.weight", (2, 8), ((Box((3, 0), (2, 8)), Box.full((2, 8))),))
    fused.shard = ShardSpec((q, k))  # type: ignore[attr-defined]
    return [*result, fused]


def _config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.1, "weight_decay": 0.2, **fields})


def _gradient(step: int, number: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + number), dtype=torch.float64)


def _run(parameters: list[nn.Parameter], config: OptimizerConfig, steps: int = 5) -> ZeroOptimizer:
    optimizer = ZeroOptimizer(parameters, Grid.single(), config, 100)
    for step in range(1, steps + 1):
        optimizer.zero_gradients()
        for number, p in enumerate(parameters):
            if p.requires_grad:
                p.main_grad.add_(_gradient(step, number, p.shape))  # type: ignore[attr-defined]
        optimizer.reduce_gradients()
        optimizer.update(step, 0.01, 0.5)
    return optimizer


def test_later_rules_count_setting_by_setting() -> None:
    config = _config(
        rules=[
            {"match": "layers.*", "lr_scale": 0.5},
            {"match": "layers.[0-3].*", "weight_decay": 0.7, "frozen": True},
            {"match": "*norm*", "lr_scale": 2.0, "frozen": False},
        ]
    )
    assert rule_for("embedding.weight", True, config) == Rule(1.0, 0.2)
    assert rule_for("layers.7.o.weight", True, config) == Rule(0.5, 0.2)
    assert rule_for("layers.3.o.weight", True, config) == Rule(0.5, 0.7)
    assert rule_for("layers.3.norm.weight", False, config) == Rule(2.0, 0.7)
    assert rule_for("final_norm.weight", False, config) == Rule(2.0, 0.0)
    frozen = {name: is_frozen(name, config) for name in ("layers.3.o.weight", "layers.3.norm.weight", "head.weight")}
    assert frozen == {"layers.3.o.weight": True, "layers.3.norm.weight": False, "head.weight": False}


def test_rates_and_decay_by_name_are_groups_of_torch() -> None:
    """Also of one of two tensors in a fused parameter."""
    config = _config(
        rules=[
            {"match": "embedding.*", "lr_scale": 0.1},
            {"match": "*.k.weight", "lr_scale": 3.0, "weight_decay": 0.0},
            {"match": "*norm*", "weight_decay": 0.4},
        ]
    )
    parameters = _parameters()
    reference = [nn.Parameter(p.detach().clone()) for p in parameters[:3]]
    reference += [nn.Parameter(half.clone()) for half in parameters[3].detach().split([3, 2])]
    groups = [
        {"params": [p], "lr": 0.01 * scale, "weight_decay": decay}
        for p, scale, decay in zip(reference, [0.1, 1, 1, 1, 3], [0.2, 0.4, 0.2, 0.2, 0.0], strict=True)
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    for step in range(1, 6):
        gradients = [_gradient(step, number, p.shape) * 0.5 for number, p in enumerate(parameters)]
        for p, gradient in zip(reference, [*gradients[:3], *gradients[3].split([3, 2])], strict=True):
            p.grad = gradient
        torch_optimizer.step()
    _run(parameters, config)
    for p, expected in zip(parameters[:3], reference, strict=False):
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parameters[3], torch.cat(reference[3:]), rtol=1e-12, atol=1e-12)


def test_sgd_is_that_of_torch() -> None:
    parameters = _parameters()
    reference = [nn.Parameter(p.detach().clone()) for p in parameters]
    torch_optimizer = torch.optim.SGD(reference, lr=0.01, momentum=0.8)
    for step in range(1, 6):
        for number, p in enumerate(reference):
            p.grad = _gradient(step, number, p.shape) * 0.5
        torch_optimizer.step()
    optimizer = _run(parameters, _config(name="sgd", momentum=0.8, weight_decay=0.0))
    assert optimizer.state_kinds == ("weights", "m")
    for p, expected in zip(parameters, reference, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


def test_lion_moves_every_weight_by_the_rate() -> None:
    parameters = _parameters()
    before = copy.deepcopy([p.detach() for p in parameters])
    optimizer = _run(parameters, _config(name="lion", weight_decay=0.0), steps=1)
    assert optimizer.state_kinds == ("weights", "m")
    for number, (p, old) in enumerate(zip(parameters, before, strict=True)):
        torch.testing.assert_close(p.detach(), old - 0.01 * _gradient(1, number, p.shape).sign(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_average_follows_the_masters(dtype: torch.dtype) -> None:
    parameters = _parameters()
    for p in parameters:
        p.data = p.data.to(dtype)
    expected = [p.detach().to(torch.float64) for p in parameters]
    for steps in range(1, 5):
        again = _parameters()
        for p in again:
            p.data = p.data.to(dtype)
        optimizer = _run(again, _config(ema_decay=0.75), steps)
        masters = {piece.part.name: values for piece, values in optimizer.state_pieces("weights")}
        names = [*NAMES, "layers.1.q.weight"]
        expected = [0.75 * average + 0.25 * _whole(masters, name, average) for average, name in zip(expected, names, strict=True)]
    averages = {piece.part.name: values for piece, values in optimizer.state_pieces("ema")}
    for average, name in zip(expected, names, strict=True):
        torch.testing.assert_close(_whole(averages, name, average), average, rtol=1e-5, atol=1e-6)


class _Ones:
    def read(self, part: Part, box: Box) -> Tensor:
        return torch.ones(box.shape, dtype=torch.float64)


def test_the_average_begins_with_the_weights_that_are_loaded() -> None:
    """Not with those that the parameters had before there was a source."""
    optimizer = ZeroOptimizer(_parameters(), Grid.single(), _config(ema_decay=0.9), 100)
    optimizer.load("weights", _Ones())
    for kind in ("weights", "ema"):
        assert all((values == 1).all() for _, values in optimizer.state_pieces(kind))


def _whole(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A parameter from its logical tensors."""
    found = torch.cat((tensors[name], tensors["layers.1.k.weight"])) if name.endswith("q.weight") else tensors[name]
    return found.to(like.dtype)


def test_frozen_parameters_cost_nothing_and_are_saved() -> None:
    rules = [{"match": "embedding.*", "frozen": True}, {"match": "layers.1.[qk].*", "frozen": True}]
    config = _config(rules=rules, ema_decay=0.9)
    parameters = _parameters()
    freeze(parameters, config)
    before = [p.detach().clone() for p in parameters]
    optimizer = _run(parameters, config)
    assert [p.requires_grad for p in parameters] == [False, True, True, False]
    assert sum(bucket.data.numel() for bucket in optimizer.buckets) == 128
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old) != p.requires_grad and hasattr(p, "main_grad") == p.requires_grad
    saved = {kind: {piece.part.name for piece, _ in optimizer.state_pieces(kind)} for kind in optimizer.state_kinds}
    assert saved["weights"] == saved["ema"] == {*NAMES, "layers.1.q.weight", "layers.1.k.weight"}
    assert saved["m"] == saved["v"] == {"layers.0.norm.weight", "layers.1.o.weight"}


def test_rules_that_fit_nothing_or_half_of_a_matrix_are_named() -> None:
    config = _config(rules=[{"match": "layer.*", "lr_scale": 2.0}, {"match": "*.q.weight", "frozen": True}])
    unknown, half = rule_problems(_parameters(), config)
    assert unknown.startswith(
        "optimizer.rules.0.match: 'layer.*' is the name of no weight; there are embedding.weight, layers.0."
    )
    assert "layers.1.q.weight would be frozen and layers.1.k.weight not" in half
    (nothing,) = rule_problems(_parameters(), _config(rules=[{"match": "*", "frozen": True}]))
    assert "nothing to train" in nothing
    assert not rule_problems(_parameters(), _config(rules=[{"match": "*norm*", "frozen": True}]))
