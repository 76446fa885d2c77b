"""What stages are said to cost: against the FLOPs that the metrics count, and those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.config import Config, PeftConfig
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.stages import build_stages
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.schedules import placement
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.planning.stages import Speed, stage_costs, stage_layers
from tests.decoders import DECODERS
from tests.runs import config_of, stage_of

META = torch.float32, torch.device("meta")


def _config(tp: int = 1, pp: int = 4, name: str = "zb_v", decoder: str | None = None, **training: Any) -> Config:
    model = DECODERS[decoder] | {"max_position_embeddings": 64} if decoder else {"num_hidden_layers": 7}
    return config_of(
        model=model,
        parallel={"tensor_parallel": tp, "pipeline_parallel": pp, "pipeline_schedule": name},
        training={"sequence_length": 64, "micro_batch_size": 2, **training},
        precision={"compute": "float32"},
    )


@pytest.mark.parametrize("decoder", [None, "gemma2"])
@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
@pytest.mark.parametrize("tp", [1, 2])
def test_all_stages_together_do_the_model_flops(tp: int, name: str, decoder: str | None) -> None:
    """What tp divides."""
    config = _config(tp, name=name, decoder=decoder)
    model = config.model.model_copy(update={"vocab_size": 96, "intermediate_size": 32})
    config = config.model_copy(update={"model": model})
    costs = stage_costs(config, placement(name, 4), Speed.uniform(1.0, 1.0))
    total = sum(costs.forward) + sum(costs.backward) + sum(costs.weight)
    assert total == pytest.approx(model_flops_per_token(config.model, 64) * 2 * 64 / tp, rel=1e-12)


def test_all_stages_together_do_the_flops_of_adapters() -> None:
    config = _config(1, name="zb_v", decoder="gemma2")
    config = config.model_copy(update={"peft": PeftConfig(rank=3, targets=["attention.*", "layers.[12].mlp.up"])})
    costs = stage_costs(config, placement("zb_v", 4), Speed.uniform(1.0, 1.0))
    total = sum(costs.forward) + sum(costs.backward) + sum(costs.weight)
    assert total == pytest.approx(model_flops_per_token(config.model, 64, config.peft) * 2 * 64, rel=1e-12)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_first_of_uneven_ranks_counts(decoder: str) -> None:
    """Multiply-adds of a layer's weights and of the head, on rank 0, are the elements that it has."""
    config = _config(2, 1, name="1f1b", decoder=decoder)
    stage = build_stages(config, Grid.imagined(config.parallel, config.model.num_key_value_heads, 2, 0), (0,), *META)[0]
    elements = sum(weight.numel() for layer in stage.layers for name, weight in layer.named_parameters() if weight.dim() == 2
                   and "norm" not in name)  # fmt: skip
    costs = stage_costs(config, (0,), Speed.uniform(1.0, 1.0))
    assert costs.weight[0] == 2 * 128 * elements
    assert costs.backward[0] - costs.weight[0] == 2 * (costs.forward[0] - costs.weight[0] - 6 * 128 * stage.head.weight.numel())


@pytest.mark.parametrize("decoder", [None, *DECODERS])
@pytest.mark.parametrize(
    "training",
    [{}, {"recompute": "full"}, {"recompute": "full", "recompute_every": 2}, {"recompute": "selective"}],
    ids=["none", "full", "every second layer", "selective"],
)
def test_products_of_a_stage_are_those_that_torch_counts(training: dict[str, Any], decoder: str | None) -> None:
    """Forward, input gradients and weight gradients of the last stage, without attention, whose causal half torch ignores.

    The head makes all three in the forward.
    """
    config = _config(pp=2, name="1f1b", decoder=decoder, **training)
    owners = placement("1f1b", 2)
    layers = stage_layers(config, owners)[-1]
    stage = stage_of(config, layers, last=True)
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    queue = WeightGradients([stage])
    queue.begin_step(1)
    assert len(layers)
    tokens = torch.zeros(128, dtype=torch.int64)
    batch = Batch(tokens, tokens, torch.ones(128), torch.arange(64).repeat(2), (0, 64, 128))
    x = torch.randn(128, config.model.hidden_size, requires_grad=True)
    counted = []
    with FlopCounterMode(display=False) as flops:

        def products() -> int:
            counts = flops.get_flop_counts()["Global"]
            return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

        loss = stage.loss(stage(x, batch), batch)
        counted.append(products())
        with queue.deferred("B"):
            loss.backward()
        counted.append(products() - counted[0])
        queue.run("B")
        counted.append(products() - sum(counted))
    costs = stage_costs(config, owners, Speed.uniform(1.0, 1.0))
    model = config.model
    seen = [sum(min(query + 1, model.window(layer) or 64) for query in range(64)) for layer in range(model.num_hidden_layers)]
    scores = [2 * 2 * 2 * model.num_attention_heads * model.head_dim * keys for keys in seen]  # 2 products, 2 rows, 2 FLOPs
    again = [layer for layer in layers if Recompute.of(config.training).at(layer)]
    head = 2 * 128 * stage.head.weight.numel()
    assert counted[0] - 3 * head == counted[2] == costs.weight[-1]
    assert costs.forward[-1] - counted[0] == pytest.approx(sum(scores[layer] for layer in layers))
    assert costs.backward[-1] - counted[1] == pytest.approx(sum(scores[layer] for layer in [*layers, *layers, *again]))
    assert (counted[1] > counted[0] - 3 * head) == (training.get("recompute") == "full")


def test_a_message_is_the_activation_of_the_rank() -> None:
    for tp, sequence_parallel, rows in ((1, True, 128), (2, True, 64), (2, False, 128)):
        config = _config(tp)
        parallel = config.parallel.model_copy(update={"sequence_parallel": sequence_parallel})
        config = config.model_copy(update={"parallel": parallel})
        costs = stage_costs(config, placement("zb_v", 4), Speed.uniform(1.0, 1000.0))
        assert costs.message == pytest.approx(rows * config.model.hidden_size * 4 / 1000)
