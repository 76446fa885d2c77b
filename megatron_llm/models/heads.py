"""Which heads a tensor-parallel rank has. Called by `models/attention.py`, and by `training/resolve.py` for its refusals.

Key/value heads are cut over tp in blocks, each with the query heads that share it. Where tp is a multiple of their number, each
is copied to tp / heads neighbouring ranks (`grid.kv_replica`), which divide its query heads among them. Blocks may differ by
one head: nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llm.config import ModelConfig
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import balanced, most_of


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads of this rank, by their numbers in the whole model, and how many of each no rank exceeds."""

    queries: range
    keys: range
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, model: ModelConfig, grid: Grid) -> Heads:
        group = model.num_attention_heads // model.num_key_value_heads
        copies = grid.kv_replica
        if copies.size == 1:
            keys = balanced(model.num_key_value_heads, grid.tp)
            most = most_of(model.num_key_value_heads, grid.tp)
            return cls(range(keys.start * group, keys.stop * group), keys, most * group, most)
        key = grid.tp.rank // copies.size
        share = balanced(group, copies)
        queries = range(key * group + share.start, key * group + share.stop)
        return cls(queries, range(key, key + 1), most_of(group, copies), 1)


def head_problem(model: ModelConfig, tensor_parallel: int) -> str | None:
    """Why attention cannot be cut so, None if it can."""
    heads, keys, tp = model.num_attention_heads, model.num_key_value_heads, tensor_parallel
    if tp > heads:
        return f"num_attention_heads: {heads} are fewer than parallel.tensor_parallel {tp}; lower it to at most {heads}"
    if tp > keys and tp % keys:
        possible = [n for n in range(1, heads + 1) if n <= keys or n % keys == 0]
        listed = ", ".join(map(str, possible[:64]))
        return f"num_key_value_heads: parallel.tensor_parallel {tp} is more than {keys} and no multiple of it; possible: {listed}"
    return None
