"""Every layer lands on exactly one stage, and no split is better than the one chosen."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.config import ModelConfig
from megatron_llm.models.split import attended, layer_costs, layer_scores, split_layers
from megatron_llm.ops.scores import causal_mask


def _costs(
    counts: tuple[int, ...], placement: tuple[int, ...], embedding: float, layer: float, head: float
) -> tuple[float, float, float, float]:
    """(largest rank cost, sum of squares, largest stage cost, sum of squares)."""
    costs = [count * layer for count in counts]
    costs[0] += embedding
    costs[-1] += head
    ranks = [sum(cost for cost, rank in zip(costs, placement, strict=True) if rank == here) for here in set(placement)]
    return max(ranks), sum(cost**2 for cost in ranks), max(costs), sum(cost**2 for cost in costs)


PLACEMENTS = [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3, 4), (0, 0), (0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 1, 0)]
PLACEMENTS += [(0, 1, 2, 2, 1, 0), (0, 1, 0, 1, 0, 1)]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(0, 8),
    placement=st.sampled_from(PLACEMENTS),
    embedding=st.integers(0, 30),
    layer=st.integers(1, 9),
    head=st.integers(0, 40),
)
def test_split_is_the_best_of_all(layers: int, placement: tuple[int, ...], embedding: int, layer: int, head: int) -> None:
    split = split_layers(layers, placement, embedding, layer, head)
    stages = len(placement)
    assert len(split) == stages
    assert [index for part in split for index in part] == list(range(layers))
    every = (counts for counts in itertools.product(range(layers + 1), repeat=stages) if sum(counts) == layers)
    best = min(_costs(counts, placement, embedding, layer, head) for counts in every)
    assert _costs(tuple(map(len, split)), placement, embedding, layer, head) == best


@pytest.mark.parametrize(
    ("layers", "stages", "embedding", "head", "expected"),
    [
        (8, 4, 0.0, 0.0, [2, 2, 2, 2]),
        (6, 4, 0.0, 2.0, [2, 2, 2, 0]),  # a head worth two layers
        (7, 4, 0.0, 1.0, [2, 2, 2, 1]),
        (6, 4, 1.0, 1.0, [1, 2, 2, 1]),
        (2, 4, 1.0, 5.0, [0, 1, 1, 0]),  # more stages than layers
        (3, 1, 1.0, 5.0, [3]),
    ],
)
def test_splits_by_hand(layers: int, stages: int, embedding: float, head: float, expected: list[int]) -> None:
    assert [len(part) for part in split_layers(layers, tuple(range(stages)), embedding, 1.0, head)] == expected


@pytest.mark.parametrize(
    ("layers", "placement", "head", "expected"),
    [
        (8, (0, 1, 0, 1), 0.0, [2, 2, 2, 2]),
        (9, (0, 1, 0, 1), 1.0, [2, 2, 3, 2]),  # ranks of 5, stages of at most 3, the later ones larger
        (7, (0, 1, 1, 0), 1.0, [2, 2, 2, 1]),
        (9, (0, 1, 1, 0), 3.0, [3, 3, 3, 0]),  # the head makes up for its rank's second stage
        (3, (0, 1, 1, 0), 4.0, [0, 1, 2, 0]),
        (1, (0, 1, 2, 0, 1, 2), 0.0, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_splits_over_several_stages_a_rank(layers: int, placement: tuple[int, ...], head: float, expected: list[int]) -> None:
    assert [len(part) for part in split_layers(layers, placement, 0.0, 1.0, head)] == expected


@pytest.mark.parametrize(("layers", "stages", "head"), [(32, 8, 3.0), (80, 16, 1.5), (126, 16, 0.6), (61, 20, 2.4)])
def test_large_models_are_within_a_layer_of_perfect_balance(layers: int, stages: int, head: float) -> None:
    placement = tuple(range(stages))
    split = split_layers(layers, placement, 0.0, 1.0, head)
    assert [index for part in split for index in part] == list(range(layers))
    assert _costs(tuple(map(len, split)), placement, 0.0, 1.0, head)[0] < (layers + head) / stages + 1


def test_costs_of_a_layer_by_hand() -> None:
    """Hidden 4, 2 heads of 4 over 1 KV head, ffn 5, vocabulary 7, 10 tokens, multiply-adds a token."""
    model = ModelConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    projections = 4 * 8 + 2 * 4 * 4 + 8 * 4  # q, k and v, o
    scores = 2 * (2 * 4 * 11 / 2)  # q k^T and p v: of 10 tokens the first sees 1 key, the last 10
    assert layer_costs(model, 10) == (0.0, projections + scores + 3 * 4 * 5, 4 * 7)


def test_costs_of_layers_with_windows_and_a_plain_mlp_by_hand() -> None:
    """The same, with windows of 3 tokens in two of three layers: 1, 2, and 3 for the other eight."""
    model = ModelConfig(
        vocab_size=7,
        hidden_size=4,
        intermediate_size=5,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        mlp_gated=False,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    products = 4 * 8 + 2 * 4 * 4 + 8 * 4 + 2 * 4 * 5
    narrow, full = 2 * 2 * 4 * (1 + 2 + 3 * 8) / 10, 2 * 2 * 4 * 11 / 2
    assert layer_scores(model, 0, 2, 10) == narrow and layer_scores(model, 1, 2, 10) == full
    assert layer_costs(model, 10) == (0.0, pytest.approx(products + (2 * narrow + full) / 3), 4 * 7)
    assert layer_scores(model, 0, 2, 2) == 2 * 2 * 4 * 3 / 2  # rows within the window


@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 29, 30, 31])
def test_attended_keys_are_those_of_the_mask(length: int, window: int | None) -> None:
    seen = causal_mask(length, length, window, torch.device("cpu")).sum() / length
    assert attended(length, window) == pytest.approx(seen.item())
