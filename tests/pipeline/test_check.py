"""The checker accepts what can run, counts what it needs, and finds every kind of damage to a schedule."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_llm.pipeline.check import check, dependencies, held, walk
from megatron_llm.pipeline.schedules import NAMES, Action, Schedule, forward_only, make_schedule

fast = settings(max_examples=200, deadline=None)


def _f(stage: int, mb: int) -> Action:
    return Action("F", stage, mb)


def _b(stage: int, mb: int) -> Action:
    return Action("B", stage, mb)


def _w(stage: int, mb: int) -> Action:
    return Action("W", stage, mb)


@st.composite
def valid_schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(NAMES))
    virtual = draw(st.integers(1, 3)) if name in ("interleaved", "breadth_first") else 1
    return make_schedule(name, draw(st.integers(1, 5)), draw(st.integers(1, 7)), virtual)


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


def _runs(schedule: Schedule) -> bool:
    """Whether every rank gets to its end, found by asking all ranks again and again."""
    last = len(schedule.placement) - 1
    done: set[Action] = set()
    lists = [list(actions) for actions in schedule.actions]

    def possible(action: Action) -> bool:
        kind, stage, mb = action
        if kind == "F":
            return stage == 0 or _f(stage - 1, mb) in done
        if kind == "B":
            return _f(stage, mb) in done and (stage == last or _b(stage + 1, mb) in done)
        return _b(stage, mb) in done

    while any(lists):
        heads = [actions for actions in lists if actions and possible(actions[0])]
        if not heads:
            return False
        for actions in heads:
            done.add(actions.pop(0))
    return True


# What is counted


def test_dependencies_and_consumers() -> None:
    assert dependencies(_f(0, 3), 3) == []
    assert dependencies(_f(2, 3), 3) == [_f(1, 3)]
    assert dependencies(_b(2, 3), 3) == [_f(2, 3)]
    assert dependencies(_b(1, 3), 3) == [_b(2, 3), _f(1, 3)]
    assert dependencies(_w(1, 3), 3) == [_b(1, 3)]
    assert [action.consumer(3) for action in (_f(2, 0), _b(0, 0), _w(1, 0))] == [None] * 3
    assert [action.consumer(3) for action in (_f(0, 1), _b(1, 1))] == [_f(1, 1), _b(0, 1)]


def test_messages_of_two_ranks_in_a_loop() -> None:
    """Both ranks send activations and gradients to each other, on one channel each way."""
    assert make_schedule("breadth_first", 2, 2, 2).channels == {
        (0, 1): [_f(1, 0), _f(1, 1), _f(3, 0), _f(3, 1), _b(1, 0), _b(1, 1)],
        (1, 0): [_f(2, 0), _f(2, 1), _b(2, 0), _b(2, 1), _b(0, 0), _b(0, 1)],
    }


@fast
@given(valid_schedules())
def test_channels_carry_what_is_needed_from_other_ranks_in_the_order_of_its_making(schedule: Schedule) -> None:
    made = {action: place for actions in schedule.actions for place, action in enumerate(actions)}
    carried = []
    for (sender, receiver), messages in schedule.channels.items():
        assert sender != receiver
        sources = [action._replace(stage=action.stage + (-1 if action.kind == "F" else 1)) for action in messages]
        assert {schedule.placement[action.stage] for action in messages} == {receiver}
        assert {schedule.placement[action.stage] for action in sources} == {sender}
        assert [made[action] for action in sources] == sorted(made[action] for action in sources)
        carried += messages
    crossings = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    assert len(carried) == len(set(carried)) == 2 * crossings * schedule.microbatches


def test_messages_that_come_before_they_are_needed_are_counted() -> None:
    """Rank 1 takes the last of three messages first: two wait, then one."""
    rows = ((_f(0, 0), _f(0, 1), _f(0, 2)), (_f(1, 2), _f(1, 0), _f(1, 1)))
    assert check(Schedule((0, 1), 3, rows)).early == (0, 2)
    assert check(forward_only((0, 1), 3)).early == (0, 0)


def test_held_after_each_kind() -> None:
    """Two micro-batches on one stage: 5 from F to B, 2 from B to W; peak between the second F and the second B."""
    actions = (_f(0, 0), _b(0, 0), _f(0, 1), _b(0, 1), _w(0, 0), _w(0, 1))
    assert held(Schedule((0,), 2, (actions,)), [5], [2]) == (7,)
    assert held(Schedule((0,), 2, (actions,)), [1], [3]) == (6,)
    assert held(Schedule((0,), 2, (actions[:4],)), [5], [2]) == (5,)  # not split: nothing is left after B
    assert held(forward_only((0,), 4), [5], [2]) == (5,)  # no backward: nothing is left after F


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
    assert check(ring).peak == (4, 3)
    row = (_f(0, 0), _f(1, 0), _b(1, 0), _b(0, 0))
    assert check(Schedule((0, 0, 1), 1, (row, (_f(2, 0), _b(2, 0))))).peak == (2, 1)
    with pytest.raises(ValueError, match="deadlocks"):
        check(Schedule((0, 0, 1), 1, ((row[1], row[0], *row[2:]), (_f(2, 0), _b(2, 0)))))


# Damage


@fast
@given(damage_places())
def test_missing_action(place: tuple[Schedule, int, int]) -> None:
    schedule, rank, position = place
    actions = list(schedule.actions[rank])
    gone = actions.pop(position)
    damaged = _changed(schedule, rank, actions)
    assume(any(action.kind == gone.kind for row in damaged.actions for action in row))
    with pytest.raises(ValueError, match=re.escape(f"1 actions are missing, the first is {gone}")):
        check(damaged)


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
    limit = {"stage": len(schedule.placement), "microbatch": schedule.microbatches}[field]
    actions = list(schedule.actions[rank])
    actions[position] = wrong = actions[position]._replace(**{field: -1 if direction < 0 else limit})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(f"rank {rank}: {wrong} is out of range of")):
        check(_changed(schedule, rank, actions))


@pytest.mark.parametrize("actions", [(_f(0, 0), _f(0, 1), _b(0, 1)), (_f(0, 0), _f(0, 1), _b(0, 0), _b(0, 1))])
def test_action_of_an_unknown_kind(actions: tuple[Action, ...]) -> None:
    """Counted like the others it would stand in for B of micro-batch 0, or be one too many."""
    unknown = Action("X", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rank 0: X\(stage 0, micro-batch 0\) is of no known kind$"):
        check(Schedule((0,), 2, ((*actions[:2], unknown, *actions[2:]),)))


def test_weight_gradients_without_backwards() -> None:
    with pytest.raises(ValueError, match=r"1 actions are missing, the first is B\(stage 0, micro-batch 0\)"):
        check(Schedule((0,), 1, ((_f(0, 0), _w(0, 0)),)))


@fast
@given(damage_places(), st.sampled_from(["FB", "BW"]), st.data())
def test_backward_before_its_forward_and_weight_gradient_before_its_backward(
    place: tuple[Schedule, int, int], kinds: str, data: st.DataObject
) -> None:
    schedule, rank, position = place
    assume(schedule.split or kinds == "FB")
    actions = list(schedule.actions[rank])
    first, second = (actions.index(actions[position]._replace(kind=kind)) for kind in kinds)  # type: ignore[arg-type]
    actions[first], actions[second] = actions[second], actions[first]
    with pytest.raises(ValueError, match="deadlocks: "):
        check(_changed(schedule, rank, actions))


@settings(max_examples=600, deadline=None)
@given(damage_places(), st.data())
def test_swapped_actions_pass_only_if_all_ranks_get_to_their_end(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    """Two actions of a rank change places. Some such schedules run; those that do not are refused, and only those."""
    schedule, rank, position = place
    actions = list(schedule.actions[rank])
    other = data.draw(st.integers(0, len(actions) - 1))
    actions[position], actions[other] = actions[other], actions[position]
    swapped = _changed(schedule, rank, actions)
    if _runs(swapped):
        check(swapped)
        assert sorted(action for _, action in walk(swapped)) == sorted(a for row in schedule.actions for a in row)
    else:
        with pytest.raises(ValueError, match="deadlocks: "):
            check(swapped)


def test_deadlock_names_every_rank_that_waits() -> None:
    """Both ranks do a whole micro-batch before the next, but rank 1 wants its second forward before the first backward."""
    rows = ((_f(0, 0), _b(0, 0), _f(0, 1), _b(0, 1)), (_f(1, 0), _f(1, 1), _b(1, 0), _b(1, 1)))
    with pytest.raises(
        ValueError, match=r"deadlocks: rank 0 at B\(stage 0, micro-batch 0\), rank 1 at F\(stage 1, micro-batch 1\)$"
    ):
        check(Schedule((0, 1), 2, rows))


def test_two_ranks_that_wait_for_the_same_action_are_both_named() -> None:
    """Rank 0 has put its backward before its forward, for which rank 1 waits too."""
    rows = ((_b(0, 0), _f(0, 0)), (_f(1, 0), _b(1, 0)))
    with pytest.raises(ValueError, match=r"rank 0 at B\(stage 0, micro-batch 0\), rank 1 at F\(stage 1, micro-batch 0\)$"):
        check(Schedule((0, 1), 1, rows))
