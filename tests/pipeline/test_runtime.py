"""The runtime on real ranks with a toy stage: it computes the composed function and its gradients, whatever the schedule."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.runtime import Forward
from megatron_llm.pipeline.schedules import NAMES, Action, Schedule, forward_only, make_schedule
from megatron_llm.pipeline.timeline import Event
from tests.pipeline.toy import Toy, make_grid, random_schedule, reference
from tests.ranks import run_ranks

Trained = tuple[dict[int, float], dict[int, Tensor], dict[int, Tensor]]


def _train(schedule: Schedule, grid: Grid | None = None) -> Trained:
    """Two steps (nothing may be left over from the first): losses of the last, gradients of the stages seen here by stage,
    and the share of them that was added in W.
    """
    toy = Toy(schedule.placement, grid=grid)
    by_w = {stage: torch.zeros_like(grad) for stage, grad in toy.main_grads().items()}
    run = toy.gradients.run

    def spy(key: tuple[int, int]) -> None:
        before = toy.main_grads()[key[0]].clone()
        run(key)
        by_w[key[0]] += toy.main_grads()[key[0]] - before

    with mock.patch.object(toy.gradients, "run", spy):
        toy.run(schedule)
        toy.losses.clear()
        toy.run(schedule)
    return toy.losses, toy.main_grads(), by_w


def _train_each(ranks: int, schedules: list[Schedule]) -> list[Trained]:
    grid = make_grid(ranks)
    return [_train(schedule, grid) for schedule in schedules]


def assert_computes_the_composed_function(ranks: int, schedules: list[Schedule]) -> None:
    for schedule in schedules:
        check(schedule)
    for schedule, *results in zip(schedules, *run_ranks(ranks, _train_each, ranks, schedules), strict=True):
        assert_equals_reference(schedule, results)


def assert_equals_reference(schedule: Schedule, results: list[Trained]) -> None:
    losses, gradients = reference(schedule)
    assert results[schedule.placement[-1]][0] == pytest.approx(losses, rel=1e-13)
    assert sorted(stage for _, found, _ in results for stage in found) == list(range(len(schedule.placement)))
    for _, found, by_w in results:
        for stage, gradient in found.items():
            torch.testing.assert_close(gradient, 2 * gradients[stage], rtol=1e-12, atol=1e-12)
            expected = gradient if schedule.split else torch.zeros_like(gradient)
            torch.testing.assert_close(by_w[stage], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 5), (3, 2), (4, 6)])
def test_every_schedule(ranks: int, microbatches: int) -> None:
    chunks = {"interleaved": 2, "breadth_first": 2}
    schedules = [make_schedule(name, ranks, microbatches, chunks.get(name, 1)) for name in NAMES]
    assert_computes_the_composed_function(ranks, schedules)


def _random_schedules(ranks: int, split: bool) -> list[Schedule]:
    return [random_schedule(seed, ranks, ranks + seed % 4, 1 + seed % 9, split) for seed in range(12)]


@pytest.mark.parametrize("split", [False, True], ids=["B", "B and W"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_schedule(ranks: int, split: bool) -> None:
    """Random placements (neighbouring stages on one rank, rings, folds) in random orders."""
    assert_computes_the_composed_function(ranks, _random_schedules(ranks, split))


def test_the_random_schedules_are_hard() -> None:
    """They have messages that arrive before they are needed, behind others, and results that stay on their rank."""
    schedules = _random_schedules(2, True)
    assert max(max(check(schedule).early) for schedule in schedules) > 2, "more than are posted ahead"
    assert any(a == b for schedule in schedules for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))


def _evaluate(schedule: Schedule) -> tuple[list[bool], list[float]]:
    """Forward only, with gradients enabled: does any input ask for one; losses."""
    toy, wants = Toy(schedule.placement), []

    def wrap(forward: Forward) -> Forward:
        def wrapped(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            wants.append(x is not None and x.requires_grad)
            return forward(stage, microbatch, x)

        return wrapped

    toy.run(schedule, wrap)
    return wants, [toy.losses[mb] for mb in sorted(toy.losses)]


@pytest.mark.parametrize("placement", [(0,), (0, 1), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0)])
def test_forward_only(placement: tuple[int, ...]) -> None:
    schedule = forward_only(placement, 4)
    results = run_ranks(max(placement) + 1, _evaluate, schedule)
    assert not any(any(wants) for wants, _ in results)
    assert results[placement[-1]][1] == pytest.approx(list(reference(schedule)[0].values()), rel=1e-13)


# Events


def _last_gradients(schedule: Schedule) -> list[tuple[int, bool]]:
    """(stage, its gradient was complete) in the order in which the last weight gradients were reported, in two steps."""
    toy, reports = Toy(schedule.placement), []
    stage_of = {layer.weight: stage for stage, layer in toy.layers.items()}
    expected = reference(schedule)[1]
    toy.gradients.on_last = lambda weight: reports.append(
        (stage_of[weight], torch.allclose(toy.main_grads()[stage_of[weight]], expected[stage_of[weight]], rtol=1e-12))
    )
    for _ in range(2):
        toy.run(schedule)
        toy.losses.clear()
        for gradient in toy.main_grads().values():
            gradient.zero_()
    return reports


@pytest.mark.parametrize("split", [False, True], ids=["B", "B and W"])
def test_the_last_weight_gradient_is_reported_once_a_step_when_all_are_in(split: bool) -> None:
    schedule = random_schedule(3, 2, 5, 4, split)
    results = run_ranks(2, _last_gradients, schedule)
    for rank, reports in enumerate(results):
        stages = [stage for stage, owner in enumerate(schedule.placement) if owner == rank]
        last = {action.stage: i for i, action in enumerate(schedule.actions[rank]) if action.kind == ("W" if split else "B")}
        assert reports == [(stage, True) for stage in sorted(stages, key=last.__getitem__)] * 2


# Trace


def _traced(schedule: Schedule, seconds: float) -> list[Event]:
    toy = Toy(schedule.placement)
    time.sleep(0.1 * dist.get_rank())  # ranks arrive one after the other

    def wrap(forward: Forward) -> Forward:
        def slow(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            time.sleep(seconds)
            return forward(stage, microbatch, x)

        return slow

    events: list[Event] = []
    toy.run(schedule, wrap, trace=events)
    return events


def test_trace_has_every_action_and_every_wait_on_one_clock() -> None:
    schedule = random_schedule(5, 3, 6, 3, True)
    by_rank = run_ranks(3, _traced, schedule, 0.01)
    end: dict[Action, float] = {}
    for events, actions in zip(by_rank, schedule.actions, strict=True):
        done = [Action(e.kind, e.stage, e.microbatch) for e in events if e.kind != "send"]
        assert tuple(done) == actions
        assert all(a.end <= b.start for a, b in zip(events, events[1:], strict=False)), "what one rank does does not overlap"
        assert all(e.start <= e.end and 0 <= e.start < 60 for e in events)
        end.update((Action(e.kind, e.stage, e.microbatch), e.end) for e in events if e.kind != "send")
        assert all(e.end - e.start > 0.009 for e in events if e.kind == "F")
    waits = Counter((rank, e.stage, e.microbatch) for rank, events in enumerate(by_rank) for e in events if e.kind == "send")
    crossings = [s for s in range(5) if schedule.placement[s] != schedule.placement[s + 1]]
    assert sum(waits.values()) == 2 * 3 * len(crossings)
    for rank, events in enumerate(by_rank):
        for wait, action in zip(events, events[1:], strict=False):
            if wait.kind == "send":  # who waits stops waiting only after the message was made, whichever host says so
                assert (action.stage, action.microbatch) == (wait.stage, wait.microbatch) and wait.rank == rank
                source = wait.stage - 1 if action.kind == "F" else wait.stage + 1
                assert end[Action(action.kind, source, wait.microbatch)] <= wait.end  # type: ignore[arg-type]


def test_trace_needs_no_process_group() -> None:
    schedule = make_schedule("gpipe", 1, 2)
    events = _traced_alone(schedule)
    assert [(e.rank, e.kind) for e in events] == [(0, "F"), (0, "F"), (0, "B"), (0, "B")]


def _traced_alone(schedule: Schedule) -> list[Event]:
    events: list[Event] = []
    Toy(schedule.placement).run(schedule, trace=events)
    return events


# Weight gradients


def test_a_weight_gradient_that_is_never_made_ends_the_very_step() -> None:
    schedule = Schedule(
        (0,), 2, ((Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("W", 0, 1)),)
    )
    with pytest.raises(AssertionError, match=r"weight gradients of \[\(0, 0\)\] were put off and never made"):
        Toy((0,)).run(schedule)


# Messages


def _train_with_blocking_first_messages(schedule: Schedule) -> int:
    """On channels like NCCL's: the first message of a pair makes its communicator, and blocks both ends until then."""
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    opened: set[str] = set()

    def opening(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Any:
            pair = f"{group.group_name} {min(me, peer)}-{max(me, peer)}"
            if pair not in opened:
                store.set(f"{pair} {me}", "here")
                store.wait([f"{pair} {peer}"], timedelta(seconds=60))
                opened.add(pair)
            return call(tensor, peer, group=group)

        return wrapped

    with contextlib.ExitStack() as patches:
        for name in ("send", "recv", "isend", "irecv"):
            patches.enter_context(mock.patch.object(dist, name, opening(getattr(dist, name))))
        return len(_train(schedule)[0])


@pytest.mark.parametrize("placement", [(0, 1), (0, 1, 2, 3), (0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0)])
def test_first_messages_may_block_until_both_ends_are_there(placement: tuple[int, ...]) -> None:
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    for kind, stages in (("F", range(len(placement))), ("B", reversed(range(len(placement))))):
        for stage in stages:
            rows[placement[stage]] += [Action(kind, stage, mb) for mb in range(3)]  # type: ignore[arg-type]
    schedule = Schedule(placement, 3, tuple(map(tuple, rows)))
    assert run_ranks(len(rows), _train_with_blocking_first_messages, schedule)[placement[-1]] == 3


def _directions(schedule: Schedule) -> set[tuple[str, bool]]:
    """(group, whether the message goes to a higher rank) of everything this rank sends."""
    toy, seen = Toy(schedule.placement), set()

    def isend(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Any:
        seen.add((group.group_desc, peer > dist.get_rank()))
        return real(tensor, peer, group=group)

    real = dist.isend
    with mock.patch.object(dist, "isend", isend):
        toy.run(schedule)
    return seen


def test_a_group_carries_messages_of_one_direction() -> None:
    """Else the communicator of two ranks would carry both, and NCCL would have one wait for the other."""
    results = run_ranks(2, _directions, random_schedule(1, 2, 4, 3, False))
    assert results[0] == {("pp_forward", True)} and results[1] == {("pp_backward", False)}


def _wrong_shape() -> None:
    toy = Toy((0, 1))
    toy.run(forward_only((0, 1), 1), lambda forward: lambda stage, mb, x: forward(stage, mb, x)[:2])


def test_a_message_of_another_shape_is_refused() -> None:
    """gloo would deliver it without a word."""
    with pytest.raises(Exception, match=r"the message is \(\(2, 4\), torch.float64\), but all messages are \(\(3, 4\)"):
        run_ranks(2, _wrong_shape)
