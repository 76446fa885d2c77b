"""`before_layer` announces each layer before its weights are read: what overlaps the gathering of weights hangs on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.models.decoder import DecoderStage
from megatron_llm.ops.batch import Batch
from tests.runs import TINY, config_of, stage_of

MODEL = config_of().model
N = TINY["model"]["num_hidden_layers"]


def _stage(layers: range, first: bool, last: bool) -> DecoderStage:
    torch.manual_seed(0)
    stage = stage_of(config_of(), layers, first, last, torch.float64)
    for parameter in stage.parameters():
        nn.init.normal_(parameter)
    return stage


def _modules(stage: DecoderStage) -> dict[int, list[nn.Module]]:
    """What is announced under which number."""
    modules: dict[int, list[nn.Module]] = {layer: [module] for layer, module in zip(stage.indices, stage.layers, strict=True)}
    if stage.first:
        modules[-1] = [stage.embedding]
    if stage.last:
        modules[N] = [stage.final_norm, stage.head]
    return modules


@pytest.mark.parametrize(
    ("layers", "first", "last", "expected"),
    [
        (range(N), True, True, [-1, *range(N), N]),
        (range(2), True, False, [-1, 0, 1]),
        (range(2, 4), False, False, [2, 3]),
        (range(3, N), False, True, [3, 4, N]),
        (range(4, 4), False, False, []),
    ],
)
def test_layers_are_announced_by_global_number_before_their_weights_are_read(
    layers: range, first: bool, last: bool, expected: list[int]
) -> None:
    """The weights of what was not announced yet are not numbers, so reading one too early shows."""
    batch = Batch(torch.arange(6), torch.arange(6), torch.ones(6), torch.arange(6), (0, 6))
    x = None if first else torch.ones(6, MODEL.hidden_size, dtype=torch.float64)
    plain = _stage(layers, first, last)
    stage = _stage(layers, first, last)
    modules, values, announced = _modules(stage), {}, []
    for module in (module for announced_together in modules.values() for module in announced_together):
        for parameter in module.parameters():
            values[parameter] = parameter.data.clone()
            parameter.data.fill_(float("nan"))

    def before_layer(number: int) -> None:
        announced.append(number)
        for module in modules[number]:
            for parameter in module.parameters():
                parameter.data.copy_(values[parameter])

    def result(stage: DecoderStage, y: Tensor) -> Tensor:
        return stage.loss(y, batch) if last else y

    with torch.no_grad():
        y = result(stage, stage(x, batch, before_layer=before_layer))
        assert announced == expected
        assert torch.equal(y, result(plain, plain(x, batch))) and not y.isnan().any()
