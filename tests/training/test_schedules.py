"""Any pipeline schedule, the same training: float64, against one process that runs the whole batch at once.

The rows are packed documents in file order: shorter and longer than a row, so that they cross rows and micro-batches.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_llm.cli.main import main
from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream, build_valid_streams
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.ops.batch import Batch
from megatron_llm.optim.buffers import Bucket, on_last_weight_gradient
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import NAMES, placement
from megatron_llm.training.build import Engine, build_engine, build_stages
from megatron_llm.training.resolve import layout_problems
from megatron_llm.training.step import RunState, evaluate, train_step
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights
from tests.training.commands import run_train, write_config
from tests.training.test_recovery import continue_run

SMALL: dict[str, Any] = {
    "model": {
        "vocab_size": 37,  # no TP size divides it
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,  # no PP size divides it
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # attention that tells tokens apart
    },
    "training": {"sequence_length": 8, "global_batch_size": 6, "steps": 3, "seed": 3, "eval_rows": 5},
    "optimizer": {"lr": 1e-2, "grad_clip": 0.7},
    "lr_schedule": {"kind": "constant"},
    "precision": {"compute": "float64"},
    "device": "cpu",
}
LENGTHS = (3, 21, 1, 9, 33, 2, 5, 13, 1, 30, 7, 12, 17, 4)  # 158 tokens: 19 rows, 18 of which are trained on

LOOPED = ("interleaved", "breadth_first")
FOLDED = ("zb_v", "v_half", "v_min")

Results = tuple[list[tuple[float, float]], tuple[float, float], dict[str, Tensor]]


def small(data: Path, micro_batch_size: int = 1, tied: bool = False, **sections: dict[str, Any]) -> Config:
    """A run of three steps of six rows; `micro_batch_size` decides into how many micro-batches they fall."""
    sections["training"] = {"micro_batch_size": micro_batch_size, **sections.get("training", {})}
    sections["model"] = {"tie_word_embeddings": tied, **sections.get("model", {})}
    sets = {"train": [{"path": str(data)}], "valid": [{"path": str(data), "name": "valid"}]}
    return config_of(SMALL, data={"kind": "pretrain", "order": "file", **sets}, **sections)


def schedule(name: str, ranks: int, chunks: int = 2) -> dict[str, Any]:
    """The `parallel` section of a schedule; `chunks` is for those that take any number."""
    return {"pipeline_parallel": ranks, "pipeline_schedule": name, "virtual_stages": chunks if name in LOOPED else 1}


def run(engine: Engine, config: Config) -> tuple[list[tuple[float, float]], tuple[float, float], Pieces]:
    """Train and evaluate: (loss, gradient norm) of every step, validation sums, the weights owned at the end."""
    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(config.training.steps)]
    sums = evaluate(engine, build_valid_streams(config)["valid"])
    return [(result.loss, result.grad_norm) for result in results], sums, owned_weights(engine)


def _train(config: Config) -> tuple[list[tuple[float, float]], tuple[float, float], Pieces]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    return run(build_engine(config, grid, torch.device("cpu")), config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "documents"
    rng = np.random.default_rng(11)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in LENGTHS:
            writer.add_document(rng.integers(0, 37, length))
    return prefix


@pytest.fixture(scope="module")
def oracle(data: Path) -> Any:
    """One process, one micro-batch a step; made once for tied and untied embeddings."""
    known: dict[tuple[Any, ...], Results] = {}

    def results(tied: bool, **model: Any) -> Results:
        key = (tied, *model.items())
        if key not in known:
            ((history, sums, pieces),) = run_ranks(1, _train, small(data, 6, tied, model=model))
            known[key] = history, sums, assemble([pieces])
        return known[key]

    return results


def assert_same(expected: Results, results: list[tuple[list[tuple[float, float]], tuple[float, float], Pieces]]) -> None:
    expected_history, expected_sums, expected_weights = expected
    for history, sums, _ in results:
        assert history == [pytest.approx(pair, rel=1e-9) for pair in expected_history]
        assert sums == pytest.approx(expected_sums, rel=1e-9)
    weights = assemble([pieces for *_, pieces in results])  # every element of the model is owned exactly once
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        error = (value - expected_weights[name]).norm().item()
        assert error <= 1e-9 * expected_weights[name].norm().item() + 1e-12 * value.numel() ** 0.5, name


def test_the_oracle_clips_learns_and_isolates(data: Path, oracle: Any) -> None:
    history, (_, weight), _ = oracle(False)
    assert any(norm > 0.7 for _, norm in history) and history[-1][0] < history[0][0]
    stream = build_train_stream(small(data))
    boundaries = [stream.batch([row]).cu_seqlens for row in range(18)]
    assert (0, 8) in boundaries, "a document fills a row"
    assert any(len(row) > 3 for row in boundaries), "several documents share a row"
    assert weight < 5 * 8, "the last token of a document predicts nothing"


# (ranks, micro-batch size): six micro-batches are no multiple of four ranks, three are fewer.
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 1)], ids=["pp2, m=3", "pp4, m=6"])
@pytest.mark.parametrize("name", NAMES)
def test_schedule_does_not_change_training(data: Path, oracle: Any, name: str, ranks: int, size: int) -> None:
    tied = ranks == 2 or name in FOLDED
    assert_same(oracle(tied), run_ranks(ranks, _train, small(data, size, tied, parallel=schedule(name, ranks))))


CASES: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    # name: ranks, micro-batch size, tied, parallel
    "zb_v, fewer micro-batches than stages": (4, 3, True, schedule("zb_v", 4)),
    "interleaved, fewer micro-batches than stages": (4, 3, True, schedule("interleaved", 4)),
    "interleaved, tp2 pp2": (4, 2, True, schedule("interleaved", 2) | {"tensor_parallel": 2}),
    "zb_v, tp2 pp2": (4, 2, True, schedule("zb_v", 2) | {"tensor_parallel": 2}),
    "zb_h1, tp2 pp2 without sequence parallelism": (
        4,
        2,
        False,
        schedule("zb_h1", 2) | {"tensor_parallel": 2, "sequence_parallel": False},
    ),
    "breadth_first, pp2 dp2, small buckets": (4, 1, True, schedule("breadth_first", 2) | {"bucket_size": 500}),
    "v_min, pp2 dp2, small buckets": (4, 1, True, schedule("v_min", 2) | {"bucket_size": 500}),
    "interleaved on one rank": (1, 2, True, schedule("interleaved", 1)),
    "zb_v on one rank": (1, 2, True, schedule("zb_v", 1)),
    "interleaved, four stages a rank": (2, 1, True, schedule("interleaved", 2, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts_of_schedules_do_not_change_training(data: Path, oracle: Any, case: str) -> None:
    world, size, tied, parallel = CASES[case]
    assert_same(oracle(tied), run_ranks(world, _train, small(data, size, tied, parallel=parallel)))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (2, 3), (2, 6), (4, 2), (4, 3), (4, 6)])
def test_every_schedule_and_number_of_micro_batches(
    data: Path, oracle: Any, name: str, ranks: int, size: int, tied: bool
) -> None:
    for chunks in (1, 2, 3) if name in LOOPED else (1,):
        parallel = schedule(name, ranks, chunks)
        assert_same(oracle(tied), run_ranks(ranks, _train, small(data, size, tied, parallel=parallel)))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("world", "ranks", "size", "more"),
    [
        (8, 2, 1, {"tensor_parallel": 2}),  # and dp2
        (8, 2, 3, {"tensor_parallel": 2, "sequence_parallel": False, "bucket_size": 500}),
        (8, 4, 2, {"tensor_parallel": 2}),
        (8, 4, 1, {"bucket_size": 500}),  # dp2
        (8, 2, 1, {"tensor_parallel": 4}),
    ],
    ids=["tp2 pp2 dp2", "tp2 pp2 dp2 without sp", "tp2 pp4", "pp4 dp2", "tp4 pp2"],
)
def test_every_schedule_with_other_parallelism(
    data: Path, oracle: Any, name: str, tied: bool, world: int, ranks: int, size: int, more: dict[str, Any]
) -> None:
    parallel = schedule(name, ranks) | more
    assert_same(oracle(tied), run_ranks(world, _train, small(data, size, tied, parallel=parallel)))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_with_any_number_of_layers(data: Path, oracle: Any, name: str, layers: int) -> None:
    """One or two layers leave stages without any parameter: on eight stages of four ranks most are."""
    model, parallel = {"num_hidden_layers": layers}, schedule(name, 4)
    assert_same(oracle(True, **model), run_ranks(4, _train, small(data, 1, True, model=model, parallel=parallel)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    ranks=st.integers(1, 6),
    chunks=st.integers(1, 4),
    microbatches=st.integers(1, 9),
    layers=st.integers(1, 9),
    tied=st.booleans(),
)
def test_any_combination(
    data: Path, oracle: Any, name: str, ranks: int, chunks: int, microbatches: int, layers: int, tied: bool
) -> None:
    """Numbers that are multiples of nothing; a batch has as many rows as micro-batches."""
    model = {"num_hidden_layers": layers}
    training = {"global_batch_size": microbatches, "steps": 2}
    config = small(data, 1, tied, model=model, training=training, parallel=schedule(name, ranks, chunks))
    ((history, sums, pieces),) = run_ranks(1, _train, small(data, microbatches, tied, model=model, training=training))
    assert_same((history, sums, assemble([pieces])), run_ranks(ranks, _train, config))


def _spoil(batch: Batch, field: str) -> Batch:
    """The batch without document boundaries, or without positions (zeros: RoPE does not notice that all are shifted)."""
    nothing = {"cu_seqlens": (0, batch.cu_seqlens[-1]), "positions_T": torch.zeros_like(batch.positions_T)}
    return dataclasses.replace(batch, **{field: nothing[field]})


def _train_with_a_stage_without(config: Config, number: int | None, field: str) -> list[tuple[float, float]]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    if number in engine.stages:
        stage = engine.stages[number]
        assert len(stage.layers) and not stage.first and not stage.last
        forward = stage.forward
        stage.forward = lambda x, batch, *rest, **named: forward(x, _spoil(batch, field), *rest, **named)  # type: ignore[method-assign]
    return run(engine, config)[0]


@pytest.mark.parametrize("field", ["cu_seqlens", "positions_T"])
@pytest.mark.parametrize(("name", "ranks", "middle"), [("1f1b", 4, 2), ("interleaved", 2, 1), ("zb_v", 2, 2)])
def test_a_middle_stage_without_boundaries_is_noticed(
    data: Path, oracle: Any, name: str, ranks: int, middle: int, field: str
) -> None:
    config = small(data, 2, parallel=schedule(name, ranks))
    expected = oracle(False)[0]
    for history in run_ranks(ranks, _train_with_a_stage_without, config, middle, field):
        assert all(abs(loss - right) > 1e-6 * right for (loss, _), (right, _) in zip(history, expected, strict=True))


TOUR: list[tuple[int, dict[str, Any]]] = [
    (2, schedule("zb_v", 2)),
    (2, schedule("interleaved", 2)),
    (4, schedule("1f1b", 4)),
    (1, {}),
    (4, schedule("v_half", 2) | {"tensor_parallel": 2}),
    (2, schedule("breadth_first", 2, 3)),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_continues_under_any_schedule(data: Path, tmp_path: Path, tied: bool) -> None:
    def history(folder: str, layouts: list[tuple[int, dict[str, Any]]]) -> list[tuple[float, float]]:
        logging = {"run_dir": str(tmp_path / folder)}
        return [
            result
            for world, parallel in layouts
            for result in run_ranks(world, continue_run, small(data, 2, tied, parallel=parallel, logging=logging))[0]
        ]

    stayed = history("stayed", [(1, {})] * len(TOUR))
    assert history("moved", TOUR) == [pytest.approx(result, rel=1e-9) for result in stayed]


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
        stages |= build_stages(config, grid, (0, 1, 0, 1), torch.device("cpu"))
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
