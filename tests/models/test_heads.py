"""Which heads a rank of tensor parallelism has, against tables written by hand; every head somewhere, and with its key."""

from __future__ import annotations

import itertools

import pytest

from megatron_llm.config import ModelConfig, ParallelConfig
from megatron_llm.models.heads import Heads, head_problem
from megatron_llm.parallel.grid import Grid


def _model(heads: int, keys: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=2,
        num_attention_heads=heads, num_key_value_heads=keys,
    )  # fmt: skip


def pairs(*cuts: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cuts))


def _all(heads: int, keys: int, tp: int) -> list[Heads]:
    parallel = ParallelConfig(tensor_parallel=tp)
    return [Heads.of(_model(heads, keys), Grid.imagined(parallel, keys, tp, rank)) for rank in range(tp)]


@pytest.mark.parametrize(
    ("heads", "keys", "tp", "queries", "held"),
    [
        (8, 4, 2, [(0, 4), (4, 8)], [(0, 2), (2, 4)]),
        (8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (71, 1, 2, [(0, 36), (36, 71)], [(0, 1), (0, 1)]),  # Falcon-7B
        (28, 4, 8, pairs(0, 4, 7, 11, 14, 18, 21, 25, 28), [(k, k + 1) for k in (0, 0, 1, 1, 2, 2, 3, 3)]),  # Qwen2.5-7B
        (12, 12, 8, pairs(0, 2, 4, 6, 8, 9, 10, 11, 12), pairs(0, 2, 4, 6, 8, 9, 10, 11, 12)),  # GPT-2
        (9, 3, 2, [(0, 6), (6, 9)], [(0, 2), (2, 3)]),
    ],
)
def test_tables(heads: int, keys: int, tp: int, queries: list[tuple[int, int]], held: list[tuple[int, int]]) -> None:
    found = _all(heads, keys, tp)
    assert [(rank.queries.start, rank.queries.stop) for rank in found] == queries
    assert [(rank.keys.start, rank.keys.stop) for rank in found] == held


def test_every_query_is_once_somewhere_with_its_key() -> None:
    tried = 0
    for keys in range(1, 9):
        for group in range(1, 8):
            for tp in range(1, 17):
                if head_problem(_model(keys * group, keys), tp) is None:
                    ranks = _all(keys * group, keys, tp)
                    assert [query for rank in ranks for query in rank.queries] == list(range(keys * group))
                    assert all(len(rank.queries) and len(rank.queries) % len(rank.keys) == 0 for rank in ranks)
                    sizes = {len(rank.queries) for rank in ranks}
                    assert max(sizes) - min(sizes) <= (group if tp <= keys else 1)
                    for rank in ranks:
                        mine = len(rank.queries) // len(rank.keys)
                        assert [query // group for query in rank.queries] == [key for key in rank.keys for _ in range(mine)]
                    tried += 1
    assert tried > 200


def test_what_cannot_be_cut_is_said() -> None:
    assert "num_attention_heads: 4 are fewer than parallel.tensor_parallel 8" in str(head_problem(_model(4, 4), 8))
    assert "more than 3 and no multiple of it; possible: 1, 2, 3, 6, 9" in str(head_problem(_model(9, 3), 4))
