"""Which layers go to which pipeline stage. Called by `training/build.py` and `planning/`.

Every layer lands on exactly one stage; stages may hold different numbers of layers, or none besides the embedding or
the head. The split minimizes the work of the slowest rank, and then the slowest stage, counting the head by its FLOPs
against a layer's.
"""

from __future__ import annotations

from megatron_llm.config import ModelConfig


def attended(length: int, window: int | None) -> float:
    """Keys that a query sees on average over a row of one document: query p of 1 ... length sees min(p, window)."""
    if not length:
        return 0.0
    seen = min(length, window or length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def layer_products(model: ModelConfig, queries: int, keys: int, inner: int) -> float:
    """Forward multiply-adds per token with the weights of a layer, for so many query heads, key heads and inner channels."""
    matrices = 3 if model.mlp_gated else 2
    return float(model.hidden_size * (2 * model.head_dim * (queries + keys) + matrices * inner))


def layer_scores(model: ModelConfig, layer: int, queries: int, sequence_length: int) -> float:
    """The same of q k^T and p v, which have no weights; they depend on the layer where only some have a sliding window."""
    return 2.0 * queries * model.head_dim * attended(sequence_length, model.window(layer))


def layer_costs(model: ModelConfig, sequence_length: int) -> tuple[float, float, float]:
    """Forward multiply-adds per token of (embedding, one layer, head). The embedding is a lookup: bytes, no FLOPs.

    A layer is the mean of all. Models with and without a sliding window in their layers alternate them every few layers, so every
    stage gets about as many of each; what it has more or less of one sort costs less than a layer, the unit of the split, unless
    rows are so long that scores are most of the work.
    """
    heads, number = model.num_attention_heads, model.num_hidden_layers
    products = layer_products(model, heads, model.num_key_value_heads, model.intermediate_size)
    scores = sum(layer_scores(model, layer, heads, sequence_length) for layer in range(number)) / number
    return 0.0, products + scores, float(model.hidden_size * model.vocab_size)


def split_layers(num_layers: int, placement: tuple[int, ...], embedding: float, layer: float, head: float) -> list[range]:
    """Consecutive layers of each stage.

    A rank works off all its stages for every micro-batch, so the largest sum of a rank counts first; then, as each hop
    of a micro-batch waits for one stage, the largest stage. Among equals the sums of squares decide: work is spread.

    Layers are dealt one by one to the rank that has the least to do, and on it to its smallest stage. This is optimal:
    costs grow linearly with the layers, and every count of layers a stage is possible. Later stages win a tie, because
    earlier ones hold the activations of more micro-batches.

    Args:
        placement: the pipeline rank of every stage, in the order of the model.
        embedding, layer, head: costs; the embedding's counts on the first stage, the head's on the last.
    """
    assert placement and layer > 0
    stages = range(len(placement))
    cost = [0.0] * len(placement)
    cost[0] += embedding
    cost[-1] += head
    counts = [0] * len(placement)
    for _ in range(num_layers):
        load = [0.0] * (max(placement) + 1)
        for stage in stages:
            load[placement[stage]] += cost[stage]
        chosen = min(stages, key=lambda stage: (load[placement[stage]], cost[stage], -stage))
        counts[chosen] += 1
        cost[chosen] += layer
    starts = [sum(counts[:stage]) for stage in stages]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
