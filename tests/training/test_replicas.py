"""A bit that differs in any kind of copy of a weight is found, and named with its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.stages import parameters
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.training import replicas
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import build_engine
from megatron_llm.training.loop import _steps
from megatron_llm.training.replicas import check_replicas, differing_copies, hash_bits
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.runs import config_of
from tests.training.planted import fresh_run

Fault = tuple[int, str]
"""Rank, and the logical name of a tensor of which it has one bit wrong."""


def flip(weight: torch.Tensor) -> None:
    """The lowest bit of the last element."""
    weight.view(torch.int64).view(-1)[-1].bitwise_xor_(1)


def check_with_faults(config: Config, faults: list[Fault]) -> list[str]:
    """What is said after a step without faults, then with each of them alone."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    train_step(engine, build_train_stream(config), RunState())
    held = {
        part.name: parameter.data[local.slices]
        for parameter in parameters(engine.stages)
        for part in parameter.shard.parts  # type: ignore[attr-defined]
        for local, _ in part.pairs
    }

    def said() -> str:
        try:
            check_replicas(engine)
        except AgreedError as error:
            return str(error)
        return ""

    messages = [said()]
    for rank, name in faults:
        if grid.world.rank == rank:
            flip(held[name])
        messages.append(said())
        if grid.world.rank == rank:
            flip(held[name])
    return messages


CASES: dict[str, tuple[int, dict[str, Any], bool, list[tuple[Fault, str]]]] = {
    "tp2 dp2": (
        4,
        {"tensor_parallel": 2},
        False,
        [
            ((3, "layers.0.mlp.down.weight"), "(the 32 x 24 elements at 0, 24): rank 1 and rank 3 hold different values"),
            ((2, "layers.1.mlp_norm.weight"), "(the 32 elements at 0): not on rank 2 what it is on ranks 0, 1 and 3"),
        ],
    ),
    "tp4 over 2 kv heads": (
        4,
        {"tensor_parallel": 4},
        False,
        [((3, "layers.1.attention.k.weight"), "(the 4 x 32 elements at 4, 0): rank 2 and rank 3 hold different values")],
    ),
    "pp2 tied": (
        2,
        {"pipeline_parallel": 2},
        True,
        [((1, "embedding.weight"), "(the 97 x 32 elements at 0, 0): rank 0 and rank 1 hold different values")],
    ),
    "dp3": (
        3,
        {},
        False,
        [((0, "final_norm.weight"), "(the 32 elements at 0): not on rank 0 what it is on ranks 1 and 2")],
    ),
    "pp2 tied on one rank": (2, {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}, True, []),
    "pp4, stages without parameters": (4, {"pipeline_parallel": 4}, False, []),
    "single": (1, {}, False, []),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_copies_pass_and_one_wrong_bit_is_named(case: str) -> None:
    world, parallel, tied, faults = CASES[case]
    model = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    config = config_of(model=model, parallel=parallel, training={"global_batch_size": 12})
    for clean, *messages in run_ranks(world, check_with_faults, config, [fault for fault, _ in faults]):
        assert clean == ""
        for ((_, name), expected), message in zip(faults, messages, strict=True):
            assert f"copies of weights differ: {name} {expected}. A device" in message


def first_step_that_notices(config: Config) -> int:
    """The step after which the loop ends with an error, if a bit of rank 1's weights flips in the fifth."""
    run = fresh_run(config)
    ends, batch = 5 * config.training.global_batch_size, run.train_stream.batch

    def flipping(rows: Sequence[int | None]) -> Batch:
        if run.engine.grid.world.rank == 1 and ends - 1 in rows:
            flip(run.engine.stages[0].final_norm.weight.data)
        return batch(rows)

    run.train_stream.batch = flipping  # type: ignore[method-assign]
    with pytest.raises(AgreedError, match="copies of weights differ"):
        _steps(run)
    return run.state.step


def test_a_run_checks_as_often_as_it_is_told(tmp_path: Path) -> None:
    training = {"steps": 9, "check_replicas_every": 3, "micro_batch_size": 4}
    # Not a copy of a data-parallel rank: those are all written anew in every step.
    sections = {"parallel": {"tensor_parallel": 2}, "training": training, "logging": {"run_dir": str(tmp_path)}}
    config = config_of(model={"num_hidden_layers": 1}, **sections)
    assert run_ranks(2, first_step_that_notices, config) == [6, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_knows_bits_and_places(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40, 100).to(dtype)
    values[0, 0], values[20, 48] = 1.0, 2.0  # values whose bits differ in high places only
    changed = {hash_bits(values).item()}
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    width, count = 8 * values.element_size(), 1
    for bit in range(width):
        for place in (0, 1, 3999):
            other = values.clone()
            other.view(integers).view(-1)[place] ^= -(1 << bit) if bit == width - 1 else 1 << bit
            changed.add(hash_bits(other).item())
            count += 1
    swapped = values.clone()
    swapped[0, 0], swapped[20, 48] = 2.0, 1.0
    changed |= {hash_bits(swapped).item(), hash_bits(values.flip(0)).item(), hash_bits(torch.zeros(3, dtype=dtype)).item()}
    changed |= {hash_bits(-torch.zeros(3, dtype=dtype)).item(), hash_bits(torch.zeros(4, dtype=dtype)).item()}
    assert len(changed) == count + 5
    whole = hash_bits(values.t())
    monkeypatch.setattr(replicas, "_CHUNK_ELEMENTS", 7)
    assert hash_bits(values.t()) == whole


def test_without_a_majority_all_are_named() -> None:
    key = ("w", (0,), (4,))
    assert differing_copies([{key: 1}, {key: 2}, {key: 3}, {}]) == [
        "w (the 4 elements at 0): rank 0 and rank 1 and rank 2 hold different values"
    ]
    assert differing_copies([{key: 1}, {key: 2}, {key: 1}, {key: 3}]) == [
        "w (the 4 elements at 0): not on ranks 1 and 3 what it is on ranks 0 and 2"
    ]
