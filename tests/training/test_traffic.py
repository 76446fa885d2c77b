"""The bytes that a step exchanges are those of the formulas in `docs/performance.md`, and all that it exchanges is counted.

The formulas are written here once more, from the shapes of the model: per rank, summed over its data-parallel neighbours,
because what a rank adds to replicas depends on where its ZeRO-1 slice lies. Mostly in bfloat16, where weights, activations and
messages have another size than gradients and statistics.
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_llm.config import Config, PeftConfig
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.traffic import Exchange, Traffic
from megatron_llm.pipeline.schedules import NAMES
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.runs import TINY, config_of
from tests.training.commands import read_metrics, run_train, write_config

LAYERS, HIDDEN, FFN, VOCABULARY, HEADS, KV_HEADS, ROWS, LENGTH = 5, 64, 96, 97, 8, 2, 8, 16
HEAD_DIM = HIDDEN // HEADS
MODEL = {"hidden_size": HIDDEN, "intermediate_size": FFN}  # every parameter is whole cache lines: only buckets are padded
LINE = 64  # elements
SIZES = {"bfloat16": (2, 4), "float64": (8, 8)}  # bytes of activations and weights, of gradients and statistics

Payload = dict[str, Counter[Exchange]]
Place = tuple[int, int]  # pipeline and tensor-parallel rank


def _config(
    size: int = 2,
    tied: bool = False,
    compute: str = "bfloat16",
    sent: str = "auto",
    recompute: str = "none",
    block: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    model = {**MODEL, "tie_word_embeddings": tied, **(block or {})}
    precision = {"compute": compute, "gradient_reduction": sent}
    training = {"micro_batch_size": size, "recompute": recompute}
    return config_of(TINY, model=model, parallel=parallel, training=training, precision=precision)


class _Dispatched(TorchDispatchMode):
    """Bytes of everything that passes torch's dispatcher on its way to a process group, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]  # in place, or input and output
            self.bytes[func._opname] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _step(config: Config) -> tuple[Place, int, dict[str, Traffic], Counter[str]]:
    """This rank's place, how many layers it has, what a step added to its counts, and what the dispatcher saw."""
    grid = Grid.build(config.parallel, KV_HEADS)
    engine = build_engine(config, grid, torch.device("cpu"))
    stream = build_train_stream(config)
    before = grid.traffic()
    with _Dispatched() as dispatched:
        train_step(engine, stream, RunState())
    layers = sum(len(stage.layers) for stage in engine.stages.values())
    added = {axis: now - before[axis] for axis, now in grid.traffic().items()}
    return (grid.pp.rank, grid.tp.rank), layers, added, dispatched.bytes


def _owners(config: Config) -> list[int]:
    """The pipeline rank of every stage."""
    ranks = list(range(config.parallel.pipeline_parallel))
    if config.parallel.pipeline_schedule in ("zb_v", "v_half", "v_min"):
        return ranks + ranks[::-1]
    return ranks * config.parallel.virtual_stages


def _parameters(config: Config, place: Place, layers: int) -> int:
    """Elements of a rank's weights, the rows that pad the vocabulary included."""
    tp, owners = config.parallel.tensor_parallel, _owners(config)
    attention = 2 * HEADS // tp * HEAD_DIM * HIDDEN + 2 * max(1, KV_HEADS // tp) * HEAD_DIM * HIDDEN
    vocabulary = -(-VOCABULARY // tp) * HIDDEN
    first, last = place[0] == owners[0], place[0] == owners[-1]
    matrices = (first or last) if config.model.tie_word_embeddings and owners[0] == owners[-1] else first + last
    return layers * (attention + 3 * FFN // tp * HIDDEN + 2 * HIDDEN) + matrices * vocabulary + last * HIDDEN


def _needed(config: Config, world: int, place: Place, layers: int, votes: int = 0) -> Payload:
    """Payload of a step of all data-parallel ranks at `place` together, but for that of ZeRO-1."""
    parallel, owners = config.parallel, _owners(config)
    tp, dp = parallel.tensor_parallel, world // (parallel.tensor_parallel * parallel.pipeline_parallel)
    element, stat = SIZES[config.precision.compute]
    microbatches = ROWS // config.training.micro_batch_size  # of all replicas
    tokens = config.training.micro_batch_size * LENGTH
    activations = microbatches * tokens * HIDDEN * element
    first, last = place[0] == owners[0], place[0] == owners[-1]
    again = layers * (config.training.recompute == "full")  # layers whose forward runs twice but for the last product
    needed: Payload = {axis: Counter() for axis in ("tp", "pp_forward", "pp_backward", "kv_replica", "tied", "world")}

    if tp > 1:
        needed["tp"]["all_gather"] = last * microbatches * 3 * tokens * stat * tp
        if parallel.sequence_parallel:
            needed["tp"]["all_gather"] += activations * (layers * (2 + 2 + 2) + first + last + again * 2)
            needed["tp"]["reduce_scatter"] = activations * (layers * (2 + 2) + first + last + again)
            needed["tp"]["all_reduce"] = (2 * layers + last) * HIDDEN * stat
        else:
            needed["tp"]["all_reduce"] = activations * (layers * (2 + 2) + first + last + again)
    if tp > KV_HEADS:
        needed["kv_replica"]["all_reduce"] = layers * 2 * HEAD_DIM * HIDDEN * stat
    message = activations // (tp if parallel.sequence_parallel else 1)
    for a, b in pairwise(owners):
        for sender, receiver in ((a, b), (b, a)):  # activations, then their gradients
            if place[0] == sender != receiver:
                needed["pp_forward" if sender < receiver else "pp_backward"]["message"] += message
    if config.model.tie_word_embeddings and owners[0] != owners[-1] and (first or last):
        block = -(-VOCABULARY // tp)
        needed["tied"]["all_reduce"] = min(block, VOCABULARY - place[1] * block) * HIDDEN * stat
    if world > 1:
        needed["world"]["all_reduce"] = dp * (3 + votes) * stat
    return needed


def _assert_minimal(config: Config, world: int) -> None:
    results = run_ranks(world, _step, config)
    for _, _, added, dispatched in results:
        _assert_all_is_counted(list(added.values()), dispatched)
    layers_at = {place: layers for place, layers, *_ in results}
    assert sum(layers for (_, tp), layers in layers_at.items() if tp == 0) == LAYERS
    sent = sum(traffic.sent for _, _, added, _ in results for traffic in added.values())
    least = 0.0
    for place, layers in layers_at.items():
        counted: Payload = {}
        for _, _, added, _ in (result for result in results if result[0] == place):
            for axis, traffic in added.items():
                counted[axis] = counted.get(axis, Counter()) + traffic.payload
        zero = counted.pop("dp_cp", None)
        if zero is not None:
            least += _assert_zero_is_minimal(zero, config, world, place, layers)
        needed = _needed(config, world, place, layers)
        least += sum(_ring(world, config, axis, payload) for axis, payload in needed.items())
        assert {axis: +payload for axis, payload in counted.items() if +payload} == {
            axis: +payload for axis, payload in needed.items() if +payload
        }, place
    assert sent == pytest.approx(least, rel=1e-12)


def _assert_zero_is_minimal(counted: Counter[Exchange], config: Config, world: int, place: Place, layers: int) -> float:
    """Every element of the buckets is reduced once and gathered once, and buckets are weights and what rounds them up.

    With stage 0 gradients are gathered and not weights; gradients sent in bfloat16 go from all to all.

    Returns the bytes that all data-parallel ranks together send for it.
    """
    parallel = config.parallel
    replicas = world // (parallel.tensor_parallel * parallel.pipeline_parallel)
    element, stat = SIZES[config.precision.compute]
    gathered = element if parallel.zero_stage else stat
    narrow = config.precision.gradient_reduction == "bfloat16"
    reduced, kind = (2, "all_to_all") if narrow else (stat, "reduce_scatter")
    elements = counted["all_gather"] // (replicas * gathered)
    assert counted == Counter({kind: replicas * reduced * elements, "all_gather": replicas * gathered * elements})
    weights = _parameters(config, place, layers)
    buckets = weights // (parallel.bucket_size or 1_000_000) + 1
    buckets += 2 * config.model.tie_word_embeddings  # a tied matrix has its own
    assert weights <= elements < weights + buckets * replicas * LINE, (elements, weights)
    return (replicas - 1) * elements * (gathered + reduced)


def _assert_all_is_counted(counted: list[Traffic], dispatched: Counter[str]) -> None:
    """What the dispatcher saw is what was counted: all-reduces as such, all else, on a CPU, as messages of the bytes to send."""
    reduced = sum(traffic.payload["all_reduce"] for traffic in counted)
    ring = sum(2 * (traffic.ranks - 1) / traffic.ranks * traffic.payload["all_reduce"] for traffic in counted)
    sent = sum(traffic.sent for traffic in counted) - ring
    assert dispatched.keys() <= {"allreduce_", "send", "recv_"}, "an operation that nobody counts"
    assert dispatched["allreduce_"] == reduced and dispatched["send"] == pytest.approx(sent, rel=1e-12)


def _ring(world: int, config: Config, axis: str, payload: Counter[Exchange]) -> float:
    """Bytes that the formulas in the documentation say are sent."""
    tp = config.parallel.tensor_parallel
    ranks = {"tp": tp, "kv_replica": max(1, tp // KV_HEADS), "tied": 2, "world": world}.get(axis, 1)
    gathers = payload["all_gather"] + payload["reduce_scatter"]
    return payload["message"] + (gathers + 2 * payload["all_reduce"]) * (ranks - 1) / ranks


def _pipeline(name: str, ranks: int) -> dict[str, Any]:
    chunks = 2 if name in ("interleaved", "breadth_first") else 1
    return {"pipeline_parallel": ranks, "pipeline_schedule": name, "virtual_stages": chunks}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 without sequence parallel": (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "tp4 over 2 kv heads": (4, {"tensor_parallel": 4}),
    "tp4 over 2 kv heads without sequence parallel": (4, {"tensor_parallel": 4, "sequence_parallel": False}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp4 in small buckets": (4, {"bucket_size": 10_000}),
    "dp4 stage 0": (4, {"bucket_size": 10_000, "zero_stage": 0}),
    "dp4 gradients sent in bfloat16": (4, {"bucket_size": 10_000, "sent": "bfloat16"}),
    "tp2 dp2 stage 0 tied, gradients sent in bfloat16": (
        4,
        {"tensor_parallel": 2, "zero_stage": 0, "tied": True, "sent": "bfloat16"},
    ),
    "dp2 tied in small buckets": (2, {"bucket_size": 10_000, "tied": True}),
    "tp2 dp2 in small buckets": (4, {"tensor_parallel": 2, "bucket_size": 10_000}),
    "pp2 dp2": (4, {"pipeline_parallel": 2}),
    "pp2 dp2 tied": (4, {"pipeline_parallel": 2, "tied": True}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2 pp2 in float64": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "compute": "float64"}),
    "tp2 pp2 without sequence parallel": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": False}),
    "tp2 pp2 tied": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "tied": True}),
    "tp2 pp2 split backward": (4, {"tensor_parallel": 2, **_pipeline("zb_h1", 2)}),
    "tp2 pp2 split backward in a V, tied": (4, {"tensor_parallel": 2, **_pipeline("zb_v", 2), "tied": True}),
    "tp2 pp2 dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2, "size": 4}),
    "tp2 pp2 dp2 interleaved": (8, {"tensor_parallel": 2, **_pipeline("interleaved", 2), "size": 4}),
    "tp4 dp2 over 2 kv heads": (8, {"tensor_parallel": 4, "size": 4}),
    "tp2 with full recomputation": (2, {"tensor_parallel": 2, "recompute": "full"}),
    "tp2 with selective recomputation": (2, {"tensor_parallel": 2, "recompute": "selective"}),
    "tp2 with full recomputation, without sequence parallel": (
        2,
        {"tensor_parallel": 2, "recompute": "full", "sequence_parallel": False},
    ),
    "tp2 pp2 split backward with full recomputation": (4, {"tensor_parallel": 2, **_pipeline("zb_h1", 2), "recompute": "full"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_exchanges_what_its_layout_needs(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    _assert_minimal(_config(**settings), world)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_schedules_exchange_one_message_a_boundary_and_direction(name: str, ranks: int) -> None:
    _assert_minimal(_config(tied=name in ("1f1b", "interleaved", "zb_v"), **_pipeline(name, ranks)), ranks)


BLOCKS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], int]] = {
    # model; gathers, again with full recomputation, reductions, again, of activations along tp by a layer; norms of hidden states
    "one after the other": ({}, (6, 2, 4, 1), 2),
    "side by side, one norm": ({"parallel_block": "one_norm"}, (3, 1, 2, 0), 1),
    "side by side, two norms": ({"parallel_block": "two_norms"}, (5, 2, 3, 0), 2),
    "norms behind": ({"norm_placement": "output"}, (6, 2, 4, 1), 2),
    "norm of all heads": ({"qk_norm": "full"}, (6, 2, 4, 1), 2),
}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("block", BLOCKS)
def test_layers_of_other_decoders_exchange(block: str, recompute: str) -> None:
    model, (gathers, gathers_again, scatters, scatters_again), norms = BLOCKS[block]
    config = _config(tensor_parallel=2, block=model, recompute=recompute)
    tokens, again = ROWS * LENGTH, recompute == "full"
    activations = tokens * HIDDEN * 2
    statistics = tokens * 4 * (model.get("qk_norm") == "full") * LAYERS * (4 + 2 * again)
    for _, _, added, _ in run_ranks(2, _step, config):
        assert added["tp"].payload == Counter(
            all_gather=activations * (LAYERS * (gathers + again * gathers_again) + 2) + 2 * tokens * 4 * 3,
            reduce_scatter=activations * (LAYERS * (scatters + again * scatters_again) + 2),
            all_reduce=statistics + (LAYERS * norms + 1) * HIDDEN * 4,
        )


@pytest.mark.slow
def test_metrics_tell_the_bytes_of_each_step(tmp_path: Path) -> None:
    raw = copy.deepcopy(TINY)
    raw["model"].update(MODEL)
    raw["training"].update(steps=3, eval_every=1)
    raw["precision"]["compute"] = "bfloat16"
    raw["parallel"] = {"tensor_parallel": 2}
    raw["checkpoint"] = {"every_steps": 1}
    raw["logging"] = {"run_dir": str(tmp_path / "run")}
    run_train(2, write_config(tmp_path / "run.yaml", raw))
    config = _config(tensor_parallel=2)
    needed = _needed(config, 2, (0, 0), LAYERS, votes=2)  # stop? saved?
    expected = {f"traffic_bytes/{axis}": _ring(2, config, axis, needed[axis]) for axis in ("tp", "world")}
    evaluated, *steps = read_metrics(tmp_path / "run")
    assert evaluated["step"] == 0 and not any(key.startswith("traffic") for key in evaluated)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert {key: value for key, value in line.items() if key.startswith("traffic")} == expected


RANK = 3


@pytest.mark.parametrize(
    ("world", "sequence_parallel"),
    [(2, False), (4, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, True), (4, False)))],
)
def test_adapters_add_no_message_to_a_micro_batch(world: int, sequence_parallel: bool) -> None:
    """What a full step exchanges, less what is for gradients that nobody needs; once a step, the sums of what all ranks hold."""
    parallel = {"tensor_parallel": world, "sequence_parallel": sequence_parallel}
    full = _config(compute="float64", **parallel)
    adapters = full.model_copy(update={"peft": PeftConfig(rank=RANK)})
    needed = _needed(full, world, (0, 0), LAYERS)
    activations = ROWS * LENGTH * HIDDEN * 8
    if sequence_parallel:
        needed["tp"]["all_gather"] -= activations  # for the gradient of the embedding
        needed["tp"]["reduce_scatter"] -= activations  # of what enters the first layer
        needed["tp"]["all_reduce"] -= (2 * LAYERS + 1) * HIDDEN * 8  # gradients of norms
    else:
        needed["tp"]["all_reduce"] -= activations
    needed["tp"]["all_reduce"] += 7 * LAYERS * RANK * HIDDEN * 8  # A of q, k, v, gate and up, B of o and down
    if world > KV_HEADS:
        needed["kv_replica"]["all_reduce"] = 2 * LAYERS * HEAD_DIM * RANK * 8
    for _, _, added, _ in run_ranks(world, _step, adapters):
        for axis in ("tp", "kv_replica"):
            assert +added[axis].payload == +needed[axis] if axis in added else not +needed[axis]


def test_data_parallel_ranks_exchange_adapters_only() -> None:
    config = _config(compute="float64").model_copy(update={"peft": PeftConfig(rank=RANK)})
    keys = KV_HEADS * HEAD_DIM
    outputs = [HIDDEN, keys, keys, HIDDEN, FFN, FFN, HIDDEN]
    inputs = [HIDDEN] * 6 + [FFN]
    elements = LAYERS * RANK * (sum(outputs) + sum(inputs))
    for _, _, added, _ in run_ranks(2, _step, config):
        payload = added["dp_cp"].payload
        assert payload.keys() == {"reduce_scatter", "all_gather"} and payload["reduce_scatter"] == payload["all_gather"]
        assert elements <= payload["all_gather"] // 8 < elements + (LAYERS * 12 + 2) * LINE  # each begins a line
