"""What every pipeline stage costs, from the configuration alone: the input of a simulation. Called by `cli/plan.py`.

Time is FLOPs over an assumed rate: forward, input gradient and weight gradient of a matrix product cost the same; attention
scores have no weights, and their gradient costs twice their forward. The embedding costs nothing, the head what its products
cost, which are all in the forward (`parallel/head.py`). Beside adapters only their own weight gradients are made. Recomputation
adds to the backward what it runs again: of a whole layer the forward without its last product (two in a parallel block), of
attention its scores. Of tensor-parallel ranks the first counts, which has the most heads and channels. Norms, rotary embeddings,
the loss, tensor-parallel communication and the optimizer are left out.
"""

from __future__ import annotations

from megatron_llm.config import Config
from megatron_llm.models.lora import adapted_layers
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.split import layer_costs, layer_products, layer_scores, split_layers
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.activations import compute_bytes, stage_bytes
from megatron_llm.planning.share import Share


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
    share = Share.of(config)
    linear = layer_products(model, share.queries, share.keys, share.inner)
    numbers = range(model.num_hidden_layers)
    scores = [layer_scores(model, layer, share.queries, training.sequence_length) for layer in numbers]
    layers = stage_layers(config, placement)
    products = [len(held) * linear for held in layers]
    head = [0.0] * len(layers)
    head[-1] = model.hidden_size * share.vocabulary * (3.0 if config.peft is None else 2.0)  # frozen it has no gradient
    attention = [sum(scores[layer] for layer in held) for held in layers]
    last = share.inner  # inputs of the layer's last product, which is that of attention too where they are side by side
    if model.parallel_block != "none":
        last += share.queries * model.head_dim
    first_products = linear - model.hidden_size * last
    recompute = Recompute.of(training)
    again = [sum(_again(recompute.at(layer), first_products, scores[layer]) for layer in held) for held in layers]
    adapters = [_adapters(config, held, share) for held in layers]
    weights = products if config.peft is None else adapters  # what else there is, is frozen
    seconds = 2.0 * tokens / flops  # of one multiply-add per token
    messages = tokens // (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    held_bytes = [stage_bytes(config, held, stage == 0, stage == len(layers) - 1) for stage, held in enumerate(layers)]
    return Costs(
        forward=tuple(seconds * sum(parts) for parts in zip(products, head, adapters, attention, strict=True)),
        backward=tuple(seconds * sum(parts) for parts in zip(products, adapters, attention, attention, again, strict=True)),
        weight=tuple(seconds * product for product in weights),
        message=messages * model.hidden_size * compute_bytes(config) / bandwidth,
        held_after_forward=tuple(stage.forward for stage in held_bytes),
        held_after_backward=tuple(stage.backward for stage in held_bytes),
    )


def _adapters(config: Config, layers: range, share: Share) -> float:
    """Multiply-adds per token with both matrices of the adapters of some layers, on a tensor-parallel rank."""
    model, peft = config.model, config.peft
    if peft is None:
        return 0.0
    queries, keys = share.queries * model.head_dim, share.keys * model.head_dim
    local = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": share.inner, "up": share.inner, "down": share.inner}
    kinds = [name.rpartition(".")[2] for name in adapted_layers(model, peft) if int(name.split(".")[1]) in layers]
    return float(peft.rank * sum(model.hidden_size + local[kind] for kind in kinds))


def _again(parts: frozenset[str], products: float, scores: float) -> float:
    """What backward runs again of a layer."""
    return products + scores if "layer" in parts else scores if "attention" in parts else 0.0
