"""The built-in schedules pass the checker with the promised memory; every kind of damage to one is found."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.schedules import SCHEDULES, Action, Schedule, forward_only, gpipe, one_f_one_b

stages_and_microbatches = {"stages": st.integers(1, 9), "microbatches": st.integers(1, 20)}
fast = settings(max_examples=100, deadline=None)


def _f(stage: int, mb: int) -> Action:
    return Action("F", stage, mb)


def _b(stage: int, mb: int) -> Action:
    return Action("B", stage, mb)


@fast
@given(**stages_and_microbatches)
def test_gpipe_holds_every_microbatch(stages: int, microbatches: int) -> None:
    assert check(gpipe(stages, microbatches)) == [microbatches] * stages


@fast
@given(**stages_and_microbatches)
def test_1f1b_holds_at_most_as_many_as_stages_follow(stages: int, microbatches: int) -> None:
    assert check(one_f_one_b(stages, microbatches)) == [min(microbatches, stages - rank) for rank in range(stages)]


@fast
@given(**stages_and_microbatches)
def test_forward_only_has_every_forward_and_no_backward(stages: int, microbatches: int) -> None:
    schedule = forward_only(stages, microbatches)
    check(schedule)
    assert schedule.actions == tuple(tuple(_f(stage, mb) for mb in range(microbatches)) for stage in range(stages))


def test_1f1b_by_hand() -> None:
    """3 stages, 4 micro-batches, as in figure 4 of Narayanan et al. 2021."""
    expected = ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    actions = one_f_one_b(3, 4).actions
    assert [" ".join(f"{action.kind}{action.microbatch}" for action in row) for row in actions] == expected
    assert [{action.stage for action in row} for row in actions] == [{0}, {1}, {2}]


def test_schedules_of_the_configuration() -> None:
    assert {"1f1b": one_f_one_b, "gpipe": gpipe} == SCHEDULES


# Damage


@st.composite
def valid_schedules(draw: st.DrawFn) -> Schedule:
    make = draw(st.sampled_from([gpipe, one_f_one_b]))
    return make(draw(st.integers(1, 5)), draw(st.integers(1, 7)))


def _changed(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    rows = list(schedule.actions)
    rows[rank] = tuple(actions)
    return replace(schedule, actions=tuple(rows))


@st.composite
def damage_places(draw: st.DrawFn) -> tuple[Schedule, int, int]:
    """(schedule, rank, position of one of its actions)."""
    schedule = draw(valid_schedules())
    rank = draw(st.integers(0, len(schedule.actions) - 1))
    return schedule, rank, draw(st.integers(0, len(schedule.actions[rank]) - 1))


@fast
@given(damage_places())
def test_missing_action(place: tuple[Schedule, int, int]) -> None:
    schedule, rank, position = place
    actions = list(schedule.actions[rank])
    gone = actions.pop(position)
    assume(any(action.kind == gone.kind for row in _changed(schedule, rank, actions).actions for action in row))
    with pytest.raises(ValueError, match=re.escape(f"1 actions are missing, the first is {gone}")):
        check(_changed(schedule, rank, actions))


@fast
@given(damage_places(), st.data())
def test_repeated_action(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    schedule, rank, position = place
    actions = list(schedule.actions[rank])
    actions.insert(data.draw(st.integers(0, len(actions))), actions[position])
    with pytest.raises(ValueError, match=re.escape(f"rank {rank}: {schedule.actions[rank][position]} is repeated")):
        check(_changed(schedule, rank, actions))


@fast
@given(damage_places(), st.data())
def test_action_on_the_wrong_rank(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    schedule, rank, position = place
    ranks = len(schedule.actions)
    assume(ranks > 1)
    other = data.draw(st.integers(0, ranks - 1).filter(lambda r: r != rank))
    actions = list(schedule.actions[rank])
    moved = actions.pop(position)
    guests = list(schedule.actions[other])
    guests.insert(data.draw(st.integers(0, len(guests))), moved)
    with pytest.raises(ValueError, match=re.escape(f"rank {other}: {moved} belongs to rank {rank}")):
        check(_changed(_changed(schedule, rank, actions), other, guests))


@fast
@given(damage_places(), st.sampled_from(["stage", "microbatch"]), st.sampled_from([-1, 1]))
def test_action_out_of_range(place: tuple[Schedule, int, int], field: str, direction: int) -> None:
    schedule, rank, position = place
    stages = len(schedule.placement)
    limit = {"stage": stages, "microbatch": schedule.microbatches}[field]
    actions = list(schedule.actions[rank])
    wrong = replace(actions[position], **{field: -1 if direction < 0 else limit})
    actions[position] = wrong
    with pytest.raises(ValueError, match=re.escape(f"{wrong} is out of range")):
        check(_changed(schedule, rank, actions))


@fast
@given(damage_places(), st.data())
def test_backward_before_its_forward(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    schedule, rank, _ = place
    mb = data.draw(st.integers(0, schedule.microbatches - 1))
    actions = list(schedule.actions[rank])
    forward, backward = actions.index(_f(rank, mb)), actions.index(_b(rank, mb))
    actions[forward], actions[backward] = actions[backward], actions[forward]
    with pytest.raises(ValueError, match="deadlocks: .*|expects the result of .*"):
        check(_changed(schedule, rank, actions))


@fast
@given(damage_places(), st.sampled_from("FB"), st.data())
def test_two_ends_of_a_channel_that_disagree(place: tuple[Schedule, int, int], kind: str, data: st.DataObject) -> None:
    """One rank swaps two of its forwards, or backwards, that are neighbours among their kind: legal alone, not together."""
    schedule, rank, _ = place
    assume(len(schedule.actions) > 1 and schedule.microbatches > 1)
    actions = list(schedule.actions[rank])
    places = [index for index, action in enumerate(actions) if action.kind == kind]
    first = data.draw(st.integers(0, len(places) - 2))
    i, j = places[first], places[first + 1]
    actions[i], actions[j] = actions[j], actions[i]
    with pytest.raises(ValueError, match="expects the result of .* first|deadlocks"):
        check(_changed(schedule, rank, actions))


def test_swapped_messages_are_named() -> None:
    schedule = gpipe(2, 2)
    swapped = _changed(schedule, 1, [_f(1, 1), _f(1, 0), _b(1, 0), _b(1, 1)])
    message = r"rank 1 expects the result of F\(stage 0, micro-batch 1\), but rank 0 sends that of F\(stage 0, micro-batch 0\)"
    with pytest.raises(ValueError, match=message):
        check(swapped)


def test_deadlock_names_every_rank_that_waits() -> None:
    """Both ranks do a whole micro-batch before the next, but rank 0 wants its second forward's backward first."""
    rows = ((_f(0, 0), _b(0, 0), _f(0, 1), _b(0, 1)), (_f(1, 0), _f(1, 1), _b(1, 0), _b(1, 1)))
    with pytest.raises(
        ValueError, match=r"deadlocks: rank 0 at B\(stage 0, micro-batch 0\), rank 1 at F\(stage 1, micro-batch 1\)"
    ):
        check(Schedule((0, 1), 2, rows))


def test_two_stages_on_a_rank_pass_and_count_together() -> None:
    """Round the ring twice and back (placement 0, 1, 0, 1), and two neighbours on one rank (0, 0, 1)."""
    ring = Schedule(
        (0, 1, 0, 1),
        2,
        (
            (_f(0, 0), _f(0, 1), _f(2, 0), _f(2, 1), _b(2, 0), _b(2, 1), _b(0, 0), _b(0, 1)),
            (_f(1, 0), _f(1, 1), _f(3, 0), _b(3, 0), _f(3, 1), _b(3, 1), _b(1, 0), _b(1, 1)),
        ),
    )
    assert check(ring) == [4, 3]
    row = (_f(0, 0), _f(1, 0), _b(1, 0), _b(0, 0))
    assert check(Schedule((0, 0, 1), 1, (row, (_f(2, 0), _b(2, 0))))) == [2, 1]
    with pytest.raises(ValueError, match="deadlocks"):
        check(Schedule((0, 0, 1), 1, ((row[1], row[0], *row[2:]), (_f(2, 0), _b(2, 0)))))
