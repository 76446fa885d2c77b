"""Which layers go to which pipeline stage. Called by `training/build.py`.

Every layer lands on exactly one stage; stages may hold different numbers of layers, or none besides the embedding or
the head. The split minimizes the slowest stage, counting the head by its FLOPs against a layer's.
"""

from __future__ import annotations

from functools import cache

from megatron_llm.config import ModelConfig


def layer_costs(model: ModelConfig, sequence_length: int) -> tuple[float, float, float]:
    """Forward multiply-adds per token of (embedding, one layer, head). The embedding is a lookup: bytes, no FLOPs."""
    hidden, dim = model.hidden_size, model.head_dim
    projections = hidden * dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    scores = model.num_attention_heads * dim * sequence_length  # q k^T and p v, causal: half of 2 * length each
    return 0.0, projections + scores + 3.0 * hidden * model.intermediate_size, float(hidden * model.vocab_size)


def split_layers(num_layers: int, stages: int, embedding: float, layer: float, head: float) -> list[range]:
    """Consecutive layers of each stage, minimizing the largest stage cost; among equals, the sum of squares.

    The embedding's cost counts on the first stage, the head's on the last.
    """
    assert stages > 0 and layer > 0
    offsets = [0.0] * stages
    offsets[0] += embedding
    offsets[-1] += head

    @cache
    def best(stage: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(largest cost, sum of squares, layers per stage) for stages from `stage` on with `left` layers to place."""
        if stage == stages - 1:
            cost = offsets[stage] + left * layer
            return cost, cost**2, (left,)
        options = []
        for here in range(left + 1):
            cost = offsets[stage] + here * layer
            worst, squares, rest = best(stage + 1, left - here)
            options.append((max(cost, worst), squares + cost**2, (here, *rest)))
        return min(options)

    counts = best(0, num_layers)[2]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
