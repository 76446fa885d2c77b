"""What an engine makes of a schedule: stages, tied embeddings, events, traces, and which pairs of settings are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.cli.main import main
from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.stages import build_stages
from megatron_llm.optim.buffers import Bucket, on_last_weight_gradient
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import NAMES, placement
from megatron_llm.training.build import build_engine
from megatron_llm.training.resolve import layout_problems
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.training.commands import run_train, write_config
from tests.training.small import FOLDED, LOOPED, schedule, small


def _tied_parameter(config: Config) -> tuple[int, list[str], int, bool]:
    """(stages here, names of the parts held of the embedding, their replicas, whether one rank sums it with another)."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    spans = [span for bucket in engine.optimizer.buckets for span in bucket.spans]
    parts = [part for span in spans for part in span.spec.parts if part.name == "embedding.weight"]
    if {0, len(engine.schedule.placement) - 1} <= engine.stages.keys():
        last = engine.stages[len(engine.schedule.placement) - 1]
        assert last.head.weight is engine.stages[0].embedding.weight
    return len(engine.stages), [part.name for part in parts], sum(part.replicas for part in parts), grid.tied.size > 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Looped: the first rank and the last hold a copy each, and add their gradients.
        ("interleaved", [(2, ["embedding.weight"], 2, True)] * 2),
        # Folded: both uses are on the first rank, of one parameter.
        ("zb_v", [(2, ["embedding.weight"], 1, False), (2, [], 0, False)]),
    ],
)
def test_a_tied_embedding_is_one_parameter_where_both_ends_meet(data: Path, name: str, expected: list[Any]) -> None:
    assert run_ranks(2, _tied_parameter, small(data, tied=True, parallel=schedule(name, 2))) == expected


def _watch_buckets(config: Config) -> list[tuple[int, bool]]:
    """(reports, was the gradient complete at each) of every bucket over two steps of real micro-batches."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    seen: dict[Bucket, list[Tensor]] = {bucket: [] for bucket in engine.optimizer.buckets}
    on_last_weight_gradient(engine.optimizer.buckets, engine.runtime.gradients, lambda b: seen[b].append(b.grad.clone()))
    stream, state, complete = build_train_stream(config), RunState(), dict.fromkeys(seen, True)
    reduce = engine.optimizer.reduce_gradients

    def reduce_gradients() -> Tensor:
        for bucket, reported in seen.items():
            complete[bucket] &= bool(reported) and torch.equal(reported[-1], bucket.grad)
        return reduce()

    engine.optimizer.reduce_gradients = reduce_gradients  # type: ignore[method-assign]
    for _ in range(2):
        train_step(engine, stream, state)
    return [(len(reported), complete[bucket]) for bucket, reported in seen.items()]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_h1", "zb_v"])
def test_the_last_gradient_of_every_bucket_is_reported_when_it_is_in(data: Path, name: str) -> None:
    """Tied embeddings get two gradients a micro-batch on a folded pipeline; buckets hold parameters of several stages."""
    config = small(data, 2, True, parallel=schedule(name, 2) | {"bucket_size": 1000, "tensor_parallel": 2})
    for reports in run_ranks(4, _watch_buckets, config):
        assert len(reports) > 1 and set(reports) == {(2, True)}


def _announced(config: Config) -> list[int]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    layers: list[int] = []
    engine.runtime.before_layer = layers.append
    train_step(engine, build_train_stream(config), RunState())
    return layers


def test_every_layer_is_announced_before_it_runs(data: Path) -> None:
    """Once a micro-batch, on the rank that has it, the embedding (-1) and the head (5) too."""
    config = small(data, 2, parallel=schedule("zb_v", 2))
    first, second = run_ranks(2, _announced, config)
    times = config.training.global_batch_size // config.training.micro_batch_size
    assert sorted(first + second) == sorted([*range(-1, config.model.num_hidden_layers + 1)] * times)
    assert {-1, config.model.num_hidden_layers} <= set(first) and not set(first) & set(second)
    assert first[:2] == [-1, 0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_traces_the_steps_that_were_asked_for(data: Path, tmp_path: Path, ranks: int) -> None:
    logging = {"run_dir": str(tmp_path / "run"), "trace_steps": [2, 9]}
    config = small(data, 2, parallel=schedule("zb_v", ranks), logging=logging)
    path = write_config(tmp_path / "config.yaml", config.model_dump(mode="json"))
    if ranks == 1:
        assert main(["train", str(path)]) == 0
    else:
        run_train(ranks, path)
    assert sorted(file.name for file in (tmp_path / "run/traces").iterdir()) == ["step-00000002.json", "step-00000002.png"]
    trace = json.loads((tmp_path / "run/traces/step-00000002.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] != "send"]
    done = sorted((event["cat"], event["args"]["stage"], event["args"]["microbatch"]) for event in events)
    assert done == sorted((kind, stage, mb) for kind in "FBW" for stage in range(2 * ranks) for mb in range(3))


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_and_the_schedule_agree_on_where_the_last_stage_is(data: Path, name: str) -> None:
    """The grid is made below the schedules, so it knows from the name alone whether both ends meet."""
    for ranks in (1, 2, 5):
        config = small(data, parallel=schedule(name, ranks))
        where = placement(name, ranks, config.parallel.virtual_stages)
        assert config.parallel.folded == (where[0] == where[-1])


def test_layers_run_through_the_stages_in_order(data: Path) -> None:
    config = small(data, parallel=schedule("interleaved", 2), model={"num_hidden_layers": 7})
    grids = [dataclasses.replace(Grid.single(), pp=dataclasses.replace(Grid.single().pp, rank=rank, size=2)) for rank in (0, 1)]
    stages: dict[int, Any] = {}
    for grid in grids:
        stages |= build_stages(config, grid, (0, 1, 0, 1), torch.float64, torch.device("cpu"))
    names = [name for number in sorted(stages) for p in stages[number].parameters() for name in (p.shard.parts[0].name,)]
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(7))
    assert names[0] == "embedding.weight" and names[-1] == "head.weight"


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"pipeline_schedule": "1f1b", "virtual_stages": 2}, "virtual_stages"),
        ({"pipeline_schedule": "zb_h1", "virtual_stages": 3}, "virtual_stages"),
        ({"pipeline_schedule": "zb_v", "virtual_stages": 3}, "virtual_stages"),
    ],
)
def test_impossible_pairs_are_refused_with_the_way_out(data: Path, parallel: dict[str, Any], said: str) -> None:
    problems = layout_problems(small(data, parallel={"pipeline_parallel": 2, **parallel}), 2)
    assert len(problems) == 1 and said in problems[0]
    assert parallel["pipeline_schedule"] in problems[0] and str(parallel["virtual_stages"]) in problems[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_possible_pair_is_accepted(data: Path, name: str) -> None:
    for chunks in (1, 2, 3) if name in LOOPED else (1, 2) if name in FOLDED else (1,):
        parallel = {"pipeline_parallel": 4, "pipeline_schedule": name, "virtual_stages": chunks}
        assert layout_problems(small(data, parallel=parallel), 4) == []
