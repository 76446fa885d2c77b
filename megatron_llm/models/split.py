"""Which layers go to which pipeline stage. Called by `training/build.py` and `planning/`.

Every layer lands on exactly one stage; stages may hold different numbers of layers, or none besides the embedding or
the head. The split minimizes the work of the slowest rank, and then the slowest stage, counting the head by its FLOPs
against a layer's.
"""

from __future__ import annotations

from megatron_llm.config import ModelConfig


def layer_costs(model: ModelConfig, sequence_length: int) -> tuple[float, float, float]:
    """Forward multiply-adds per token of (embedding, one layer, head). The embedding is a lookup: bytes, no FLOPs."""
    hidden, dim = model.hidden_size, model.head_dim
    projections = hidden * dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    scores = model.num_attention_heads * dim * sequence_length  # q k^T and p v, causal: half of 2 * length each
    return 0.0, projections + scores + 3.0 * hidden * model.intermediate_size, float(hidden * model.vocab_size)


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
