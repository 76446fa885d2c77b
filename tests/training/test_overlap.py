"""When the data-parallel exchange begins and when it is waited for, by the order of events in a step and not by the clock.

Two steps of a real engine with many small buckets are recorded on every rank: what each gradient, collective and forward of a
module does to which buckets. The second step shows the weights that the first one sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import overlap
import pytest
import torch
from torch import Tensor, nn

from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel import collectives
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import make_schedule
from megatron_llm.pipeline.simulate import Costs, simulate
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.runs import config_of

CASES = {"1f1b": 1, "zb_h1": 2}  # pipeline ranks; two data-parallel ranks


class Event(NamedTuple):
    """A gradient was added, a reduce-scatter or an all-gather began, weights were waited for, or a module runs forward."""

    kind: Literal["gradient", "reduce", "gather", "gathered", "forward"]
    buckets: frozenset[int]


class _Noted:
    """A collective under way of which it is noted when it is waited for."""

    def __init__(self, work: Any, note: Callable[[], None]):
        self._work, self._note = work, note

    def wait(self) -> None:
        self._work.wait()
        self._note()


@contextmanager
def _recording(engine: Engine, events: list[Event]) -> Iterator[None]:
    """Append to `events` what happens inside."""
    buckets, queue = engine.optimizer.buckets, engine.runtime.gradients

    def of(tensor: Tensor) -> int:
        places = [flat for bucket in buckets for flat in (bucket.data, bucket.grad)]
        return next(i // 2 for i, flat in enumerate(places) if 0 <= tensor.data_ptr() - flat.data_ptr() < flat.nbytes)

    def note(kind: Any, *tensors: Tensor) -> None:
        events.append(Event(kind, frozenset(of(tensor) for tensor in tensors)))

    def count(parameter: nn.Parameter, original: Callable[[nn.Parameter], None] = queue.count) -> None:
        note("gradient", parameter)
        original(parameter)

    def reduce(out: Tensor, x: Tensor, original: Any = collectives._reduce_scatter, **kwargs: Any) -> Any:
        note("reduce", x)
        return original(out, x, **kwargs)

    def gather(out: Tensor, x: Tensor, original: Any = collectives._all_gather, **kwargs: Any) -> Any:
        note("gather", out)
        return _Noted(original(out, x, **kwargs), lambda: note("gathered", out))

    with ExitStack() as stack:
        stack.enter_context(patch.object(queue, "count", count))
        stack.enter_context(patch.object(collectives, "_reduce_scatter", reduce))
        stack.enter_context(patch.object(collectives, "_all_gather", gather))
        for stage in engine.stages.values():
            for module in stage.modules():
                if list(module.parameters(recurse=False)):
                    hook = module.register_forward_pre_hook(lambda module, _: note("forward", *module.parameters(recurse=False)))
                    stack.callback(hook.remove)
        yield


def _two_steps(name: str, on: bool) -> list[list[Event]]:
    """On this rank: the events of each step."""
    parallel = {"pipeline_parallel": CASES[name], "pipeline_schedule": name, "bucket_size": 2000, "overlap": on}
    config = config_of(parallel=parallel, training={"micro_batch_size": 1})  # four micro-batches
    engine = build_engine(config, Grid.build(config.parallel, config.model.num_key_value_heads), torch.device("cpu"))
    stream, state = build_train_stream(config), RunState()
    events: list[Event] = []
    with _recording(engine, events):
        train_step(engine, stream, state)
        end = len(events)
        train_step(engine, stream, state)
    return [events[:end], events[end:]]


def _record(name: str, on: bool) -> list[list[list[Event]]]:
    """Steps of all ranks, each with at least four buckets, or the tests would say little."""
    ranks = run_ranks(2 * CASES[name], _two_steps, name, on)
    for steps in ranks:
        for events in steps:
            for kind in ("reduce", "gather"):
                exchanged = [event.buckets for event in events if event.kind == kind]
                assert len(exchanged) == len(set(exchanged)) >= 4, "every bucket once a step"
    return ranks


def _places(events: list[Event], kind: str) -> dict[int, int]:
    """For every bucket the place of the last such event."""
    return {bucket: place for place, event in enumerate(events) if event.kind == kind for bucket in event.buckets}


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_exchanged_before_it_is_complete_or_used_before_it_is_there(name: str, on: bool) -> None:
    for first, second in _record(name, on):
        for events in (first, second):
            gradients, reduced = _places(events, "gradient"), _places(events, "reduce")
            assert gradients.keys() == reduced.keys()
            assert all(gradients[bucket] < reduced[bucket] for bucket in reduced)
        history = first + second
        missing: set[int] = set()
        for event in history:
            if event.kind == "gather":
                missing |= event.buckets
            elif event.kind == "gathered":
                missing -= event.buckets
            elif event.kind == "forward":
                assert not missing & event.buckets, "a module runs whose weights were not waited for"


@pytest.mark.parametrize("name", CASES)
def test_without_overlap_the_exchange_is_not_beside_compute(name: str) -> None:
    for first, second in _record(name, on=False):
        for events in (first, second):
            assert min(_places(events, "reduce").values()) > max(_places(events, "gradient").values())
        assert _places(first, "gather").keys() == _places(first, "gathered").keys()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_reduced_during_the_last_backward(name: str) -> None:
    """All but those of the bucket that the backward ends with."""
    for steps in _record(name, on=True):
        for events in steps:
            last = max(place for place, event in enumerate(events) if event.kind == "gradient")
            early = {bucket for bucket, place in _places(events, "reduce").items() if place < last}
            assert early == _places(events, "reduce").keys() - events[last].buckets


@pytest.mark.parametrize("name", CASES)
def test_the_first_layers_run_while_weights_of_the_last_are_under_way(name: str) -> None:
    """When a module of a layer runs for the first time no more was waited for than it and those before it need."""
    for first, second in _record(name, on=True):
        assert not _places(first, "gathered"), "weights are waited for where the next step needs them"
        start = next(place for place, event in enumerate(second) if event.kind == "forward")
        waited = [event.buckets for event in second[:start] if event.kind == "gathered"]
        assert 0 < len(waited) < len(_places(first, "gather")) - 1


@pytest.mark.parametrize("name", CASES)
def test_the_bound_of_the_benchmark_is_the_simulation_where_links_are_free_or_slow(name: str) -> None:
    """Links alone, and between the two no less than the larger and no more than the sum."""
    pipeline = CASES[name]
    layers = {stage: [[overlap.Product(i, 1.0), overlap.Product(i, 2.0)] for i in range(4)] for stage in range(pipeline)}
    layouts = [overlap.Layout({stage: layers[stage]}, [3.0] * 4) for stage in range(pipeline)]
    schedule = make_schedule(name, pipeline, 4)
    compute = simulate(schedule, Costs.uniform(pipeline, 12.0, 12.0, 12.0)).timeline.makespan
    assert overlap.ideal_step(schedule, layouts, float("inf")) == pytest.approx(compute)
    slow = 1e-6
    assert overlap.ideal_step(schedule, layouts, slow) == pytest.approx(2 * 4 * 3.0 / slow, rel=1e-3)
    for bandwidth in (0.1, 0.3, 1.0):
        link = 2 * 4 * 3.0 / bandwidth
        assert max(compute, link) < overlap.ideal_step(schedule, layouts, bandwidth) < compute + link
