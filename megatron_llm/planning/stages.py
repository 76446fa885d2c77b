"""What every pipeline stage costs, from the configuration alone: the input of a simulation. Called by `cli/plan.py`.

Time is FLOPs over an assumed rate: forward, input gradient and weight gradient of a matrix product cost the same; attention
scores have no weights, and their gradient costs twice their forward. The embedding costs nothing, the head what its product
costs. Norms, rotary embeddings, the loss, tensor-parallel communication and the optimizer are left out.
"""

from __future__ import annotations

from megatron_llm.config import Config
from megatron_llm.models.split import layer_costs, split_layers
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.activations import compute_bytes, stage_bytes


def stage_layers(config: Config, placement: tuple[int, ...]) -> list[range]:
    """The layers of every stage, as a run would hold them."""
    model = config.model
    return split_layers(model.num_hidden_layers, placement, *layer_costs(model, config.training.sequence_length))


def stage_costs(config: Config, placement: tuple[int, ...], flops: float, bandwidth: float) -> Costs:
    """Costs of one micro-batch on every stage.

    flops: FLOP/s that one GPU achieves. bandwidth: bytes/s between two pipeline neighbours.
    """
    model, training, parallel = config.model, config.training, config.parallel
    tokens = training.micro_batch_size * training.sequence_length
    _, linear, head = layer_costs(model, 0)  # at length 0 a layer has no attention scores
    scores = layer_costs(model, training.sequence_length)[1] - linear
    layers = [len(layers) for layers in stage_layers(config, placement)]
    products = [count * linear for count in layers]
    products[-1] += head
    seconds = 2.0 * tokens / parallel.tensor_parallel / flops  # of one multiply-add per token
    messages = tokens // (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    held = [stage_bytes(config, count, stage == 0, stage == len(layers) - 1) for stage, count in enumerate(layers)]
    return Costs(
        forward=tuple(seconds * (product + count * scores) for product, count in zip(products, layers, strict=True)),
        backward=tuple(seconds * (product + 2 * count * scores) for product, count in zip(products, layers, strict=True)),
        weight=tuple(seconds * product for product in products),
        message=messages * model.hidden_size * compute_bytes(config) / bandwidth,
        held_after_forward=tuple(first for first, _ in held),
        held_after_backward=tuple(second for _, second in held),
    )
