"""What every pipeline stage costs, from the configuration alone: the input of a simulation. Called by `cli/plan.py`.

Time is FLOPs over an assumed rate: forward, input gradient and weight gradient of a matrix product cost the same; attention
scores have no weights, and their gradient costs twice their forward. The embedding costs nothing, the head what its products
cost, which are all in the forward (`parallel/head.py`). Of weights that are frozen no gradients are made. Recomputation
adds to the backward what it runs again: of a whole layer the forward without its last product (two in a parallel block), of
attention its scores. Of tensor-parallel ranks the first counts, which has the most heads and channels. Norms, rotary embeddings,
the loss, tensor-parallel communication and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_llm.config import Config
from megatron_llm.models.lora import adapted_layers
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.split import layer_costs, layer_products, layer_scores, split_layers
from megatron_llm.optim.rules import is_frozen
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.activations import all_stage_bytes, compute_bytes
from megatron_llm.planning.share import Share


def stage_layers(config: Config, placement: tuple[int, ...]) -> list[range]:
    """The layers of every stage, as a run would hold them."""
    model = config.model
    return list(_split(model.num_hidden_layers, placement, *layer_costs(model, config.training.sequence_length)))


@lru_cache(maxsize=64)
def _split(number: int, placement: tuple[int, ...], embedding: float, layer: float, head: float) -> tuple[range, ...]:
    """The same for every schedule, micro-batch and recomputation of a search."""
    return tuple(split_layers(number, placement, embedding, layer, head))


@dataclass(frozen=True)
class Speed:
    """What a GPU achieves.

    Attributes:
        products, scores, scores_backward: FLOP/s in matrix products, in attention's scores, and in their backward, which
            counts as twice the forward. bandwidth: bytes/s between two pipeline neighbours.
        layer: seconds that every layer takes besides in forward and in backward; head: the head, in forward.
        norms, activation: seconds to make either again, with `training.recompute: selective`.
    """

    products: float
    scores: float
    scores_backward: float
    bandwidth: float
    layer: tuple[float, float] = (0.0, 0.0)
    head: float = 0.0
    norms: float = 0.0
    activation: float = 0.0

    @classmethod
    def uniform(cls, flops: float, bandwidth: float) -> Speed:
        """The same for all FLOPs, and nothing takes time besides."""
        return cls(flops, flops, flops, bandwidth)


def stage_costs(config: Config, placement: tuple[int, ...], speed: Speed) -> Costs:
    """Costs of one micro-batch on every stage."""
    model, training, parallel = config.model, config.training, config.parallel
    tokens = training.micro_batch_size * training.sequence_length / parallel.context_parallel
    share = Share.of(config)
    linear = layer_products(model, share.queries, share.keys, share.inner)
    numbers = range(model.num_hidden_layers)
    scores = [layer_scores(model, layer, share.queries, training.sequence_length) for layer in numbers]
    layers = stage_layers(config, placement)
    products = [len(held) * linear for held in layers]
    head = [0.0] * len(layers)
    head[-1] = (
        model.hidden_size * share.vocabulary * (2.0 if _frozen(config, _head_name(config)) else 3.0)
    )  # frozen it has no gradient
    attention = [sum(scores[layer] for layer in held) for held in layers]
    last = share.inner  # inputs of the layer's last product, which is that of attention too where they are side by side
    if model.parallel_block != "none":
        last += share.queries * model.head_dim
    first_products = linear - model.hidden_size * last
    recompute = Recompute.of(training)
    recomputed = [recompute.at(layer) for layer in numbers]
    again_products = [sum(first_products for layer in held if "layer" in recomputed[layer]) for held in layers]
    again_scores = [sum(scores[layer] for layer in held if recomputed[layer] & {"layer", "attention"}) for held in layers]
    adapters = [_adapters(config, held, share) for held in layers]
    weights = [_trained(config, held, share) for held in layers]

    def seconds(products: float, forward_scores: float, backward_scores: float) -> float:
        """Of so many multiply-adds per token."""
        rates = speed.products, speed.scores, speed.scores_backward
        return 2.0 * tokens * sum(n / r for n, r in zip((products, forward_scores, backward_scores), rates, strict=True))

    forward, backward = [], []
    for stage, held in enumerate(layers):
        linear_parts = products[stage] + adapters[stage]
        besides = len(held) * speed.layer[0] + (speed.head if stage == len(layers) - 1 else 0.0)
        forward.append(seconds(linear_parts + head[stage], attention[stage], 0.0) + besides)
        parts = [recomputed[layer] for layer in held]
        again = speed.layer[0] * sum("layer" in part for part in parts)
        again += speed.norms * sum("norms" in part for part in parts) + speed.activation * sum(
            "activation" in part for part in parts
        )
        backward.append(
            seconds(linear_parts + again_products[stage], again_scores[stage], 2 * attention[stage])
            + len(held) * speed.layer[1]
            + again
        )
    messages = tokens / (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    held_bytes = all_stage_bytes(config, layers)
    return Costs(
        forward=tuple(forward),
        backward=tuple(backward),
        weight=tuple(seconds(product, 0.0, 0.0) for product in weights),
        message=messages * model.hidden_size * compute_bytes(config) / speed.bandwidth,
        held_after_forward=tuple(stage.forward for stage in held_bytes),
        held_after_backward=tuple(stage.backward for stage in held_bytes),
    )


def rank_weights(config: Config, placement: tuple[int, ...]) -> list[float]:
    """Elements of the matrices of every pipeline rank, on its first tensor-parallel rank."""
    model, share = config.model, Share.of(config)
    held = [0.0] * config.parallel.pipeline_parallel
    layer = layer_products(model, share.queries, share.keys, share.inner)
    for rank, layers in zip(placement, stage_layers(config, placement), strict=True):
        held[rank] += len(layers) * layer
    held[placement[0]] += model.hidden_size * share.vocabulary
    if placement[0] != placement[-1] or not model.tie_word_embeddings:
        held[placement[-1]] += model.hidden_size * share.vocabulary
    return held


def rank_trained(config: Config, placement: tuple[int, ...]) -> list[float]:
    """Of them, and of adapters, those that are not frozen."""
    model, share = config.model, Share.of(config)
    held = [0.0] * config.parallel.pipeline_parallel
    for rank, layers in zip(placement, stage_layers(config, placement), strict=True):
        held[rank] += _trained(config, layers, share)
    table = model.hidden_size * share.vocabulary
    held[placement[0]] += 0.0 if _frozen(config, "embedding.weight") else table
    if placement[0] != placement[-1] or not model.tie_word_embeddings:
        held[placement[-1]] += 0.0 if _frozen(config, _head_name(config)) else table
    return held


def _head_name(config: Config) -> str:
    return "embedding.weight" if config.model.tie_word_embeddings else "head.weight"


def _frozen(config: Config, name: str) -> bool:
    return is_frozen(name, config.optimizer, config.peft is not None)


def _trained(config: Config, layers: range, share: Share) -> float:
    """Elements of the matrices of some layers that are trained, adapters too: their weight gradients' multiply-adds per token."""
    model, adapters = config.model, _adapters(config, layers, share)
    if not config.optimizer.rules:
        each = layer_products(model, share.queries, share.keys, share.inner) if config.peft is None else 0.0
        return len(layers) * each + adapters
    queries, keys = share.queries * model.head_dim, share.keys * model.head_dim
    sides = {"attention.q": queries, "attention.k": keys, "attention.v": keys, "attention.o": queries}
    sides |= {f"mlp.{kind}": share.inner for kind in (("gate", "up", "down") if model.mlp_gated else ("up", "down"))}
    local = sum(side for layer in layers for kind, side in sides.items() if not _frozen(config, f"layers.{layer}.{kind}.weight"))
    return float(model.hidden_size * local) + adapters


def _adapters(config: Config, layers: range, share: Share) -> float:
    """Multiply-adds per token with both matrices of the adapters of some layers, on a tensor-parallel rank."""
    model, peft = config.model, config.peft
    if peft is None:
        return 0.0
    queries, keys = share.queries * model.head_dim, share.keys * model.head_dim
    local = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": share.inner, "up": share.inner, "down": share.inner}
    kinds = [name.rpartition(".")[2] for name in adapted_layers(model, peft) if int(name.split(".")[1]) in layers]
    return float(peft.rank * sum(model.hidden_size + local[kind] for kind in kinds))
