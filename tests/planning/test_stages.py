"""What stages are said to cost: against the FLOPs that the metrics count, and those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.config import Config
from megatron_llm.models.recompute import Recompute
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.schedules import placement
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.planning.stages import stage_costs, stage_layers
from tests.runs import config_of, stage_of


def _config(tp: int = 1, pp: int = 4, name: str = "zb_v", **training: Any) -> Config:
    return config_of(
        model={"num_hidden_layers": 7},
        parallel={"tensor_parallel": tp, "pipeline_parallel": pp, "pipeline_schedule": name},
        training={"sequence_length": 64, "micro_batch_size": 2, **training},
        precision={"compute": "float32"},
    )


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
@pytest.mark.parametrize("tp", [1, 2])
def test_all_stages_together_do_the_model_flops(tp: int, name: str) -> None:
    config = _config(tp, name=name)
    costs = stage_costs(config, placement(name, 4), flops=1.0, bandwidth=1.0)
    total = sum(costs.forward) + sum(costs.backward) + sum(costs.weight)
    assert total == pytest.approx(model_flops_per_token(config.model, 64) * 2 * 64 / tp, rel=1e-12)


@pytest.mark.parametrize(
    "training",
    [{}, {"recompute": "full"}, {"recompute": "full", "recompute_every": 2}, {"recompute": "selective"}],
    ids=["none", "full", "every second layer", "selective"],
)
def test_products_of_a_stage_are_those_that_torch_counts(training: dict[str, Any]) -> None:
    """Forward, input gradients and weight gradients of the last stage, without attention, whose causal half torch ignores."""
    config = _config(pp=2, name="1f1b", **training)
    owners = placement("1f1b", 2)
    layers = stage_layers(config, owners)[-1]
    stage = stage_of(config, layers, last=True)
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    queue = WeightGradients([stage])
    queue.begin_step(1)
    tokens = torch.zeros(128, dtype=torch.int64)
    batch = Batch(tokens, tokens, torch.ones(128), torch.arange(64).repeat(2), (0, 64, 128))
    x = torch.randn(128, config.model.hidden_size, requires_grad=True)
    counted = []
    with FlopCounterMode(display=False) as flops:

        def products() -> int:
            counts = flops.get_flop_counts()["Global"]
            return sum(count for op, count in counts.items() if "mm" in str(op))

        loss = stage.loss(stage(x, batch), batch)
        counted.append(products())
        with queue.deferred("B"):
            loss.backward()
        counted.append(products() - counted[0])
        queue.run("B")
        counted.append(products() - sum(counted))
    costs = stage_costs(config, owners, flops=1.0, bandwidth=1.0)
    scores = config.model.num_attention_heads * config.model.head_dim * 64 * 2 * 128
    again = sum(bool(Recompute.of(config.training).at(layer)) for layer in layers)
    assert counted[0] == counted[2] == costs.weight[-1]
    assert costs.forward[-1] - counted[0] == pytest.approx(len(layers) * scores)
    assert costs.backward[-1] - counted[1] == pytest.approx((2 * len(layers) + again) * scores)
    assert (counted[1] > counted[0]) == (training.get("recompute") == "full")


def test_a_message_is_the_activation_of_the_rank() -> None:
    for tp, sequence_parallel, rows in ((1, True, 128), (2, True, 64), (2, False, 128)):
        config = _config(tp)
        parallel = config.parallel.model_copy(update={"sequence_parallel": sequence_parallel})
        config = config.model_copy(update={"parallel": parallel})
        costs = stage_costs(config, placement("zb_v", 4), flops=1.0, bandwidth=1000.0)
        assert costs.message == pytest.approx(rows * config.model.hidden_size * 4 / 1000)
