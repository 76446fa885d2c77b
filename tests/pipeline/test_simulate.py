"""Simulated timelines: by hand, and every schedule with random costs against conditions that are written down anew here."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.pipeline.schedules import NAMES, Action, Schedule, forward_only, make_schedule
from megatron_llm.pipeline.simulate import Costs, Simulation, simulate
from megatron_llm.pipeline.timeline import Event, Timeline
from tests.test_readme import ROOT

TINY = 1e-9


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Schedule, Costs]:
    """A schedule of any size with costs of its own on every stage; stages without layers take no time."""
    virtual = draw(st.integers(1, 3)) if name in ("interleaved", "breadth_first") else 1
    schedule = make_schedule(name, draw(st.integers(1, 6)), draw(st.integers(1, 13)), virtual)
    stages = len(schedule.placement)
    number = st.one_of(st.just(1.0), st.just(0.0), st.floats(0.1, 5))
    values = [tuple(draw(st.lists(number, min_size=stages, max_size=stages))) for _ in range(5)]
    f, b, w, after_forward, after_backward = values
    return schedule, Costs(f, b, w, draw(st.sampled_from([0.0, 0.01, 0.7])), after_forward, after_backward)


def _duration(action: Action, schedule: Schedule, costs: Costs) -> float:
    kind, stage, _ = action
    if kind == "F":
        return costs.forward[stage]
    if kind == "W":
        return costs.weight[stage]
    return costs.backward[stage] + (0 if schedule.split else costs.weight[stage])


def _assert_possible(schedule: Schedule, costs: Costs, timeline: Timeline) -> dict[Action, Event]:
    """Every action once and as long as it takes, nothing before its input, no rank at two things, order as in the list."""
    at = {Action(e.kind, e.stage, e.microbatch): e for e in timeline.events if e.kind != "send"}
    assert len(at) == sum(e.kind != "send" for e in timeline.events) == sum(map(len, schedule.actions))
    last = len(schedule.placement) - 1

    def after(later: Action, earlier: Action) -> None:
        travels = schedule.placement[later.stage] != schedule.placement[earlier.stage]
        assert at[later].start >= at[earlier].end + (costs.message if travels else 0) - TINY

    for action, event in at.items():
        kind, stage, mb = action
        assert event.rank == schedule.placement[stage]
        assert event.end - event.start == pytest.approx(_duration(action, schedule, costs), abs=TINY)
        if kind == "F" and stage > 0:
            after(action, Action("F", stage - 1, mb))
        if kind == "B":
            after(action, Action("F", stage, mb))
            if stage < last:
                after(action, Action("B", stage + 1, mb))
        if kind == "W":
            after(action, Action("B", stage, mb))
    for actions in schedule.actions:
        for first, second in itertools.pairwise(actions):
            assert at[second].start >= at[first].end
    return at


def _assert_nobody_waits_for_nothing(schedule: Schedule, costs: Costs, at: dict[Action, Event]) -> None:
    """Every action starts when the rank's last one ends, or a message arrives: an ending that touches its start."""
    for actions in schedule.actions:
        for place, action in enumerate(actions):
            kind, stage, mb = action
            source = Action(kind, stage - 1 if kind == "F" else stage + 1, mb)
            causes = [0.0] if place == 0 else [at[actions[place - 1]].end]
            if kind != "W" and source in at:
                local = schedule.placement[source.stage] == schedule.placement[stage]
                causes.append(at[source].end + (0 if local else costs.message))
            assert any(abs(at[action].start - cause) < TINY for cause in causes)


def _peaks(schedule: Schedule, costs: Costs, at: dict[Action, Event]) -> list[float]:
    """Most bytes per rank, from what lives when the rank's actions start and end."""
    result = []
    for actions in schedule.actions:
        place = {action: index for index, action in enumerate(actions)}  # times may be equal where costs are 0
        living = [0.0]
        for moment in range(len(actions)):
            during = ends = 0.0
            for action in actions:
                if action.kind != "F":
                    continue
                kind, stage, mb = action
                b, w = place[Action("B", stage, mb)], place.get(Action("W", stage, mb))
                first, second = costs.held_after_forward[stage], costs.held_after_backward[stage]
                if place[action] <= moment <= b:
                    during += first
                if place[action] <= moment < b:
                    ends += first
                if w is not None and b < moment <= w:
                    during += second
                if w is not None and b <= moment < w:
                    ends += second
            living += [during, ends]
        result.append(max(living))
    return result


def _lower_bound(schedule: Schedule, costs: Costs) -> float:
    """No order of actions can be faster: one micro-batch through all stages and back, or the work of one rank."""
    owners = schedule.placement
    crossings = sum(a != b for a, b in itertools.pairwise(owners))
    work = [0.0] * len(schedule.actions)
    way = 2 * crossings * costs.message
    for stage, owner in enumerate(owners):
        last = costs.backward[stage] + (0 if schedule.split else costs.weight[stage])
        way += costs.forward[stage] + last
        work[owner] += schedule.microbatches * (costs.forward[stage] + costs.backward[stage] + costs.weight[stage])
    return max(way, *work)


@pytest.mark.parametrize("name", NAMES)
def test_random_costs(name: str) -> None:
    @settings(max_examples=250, deadline=None)
    @given(cases(name))
    def holds(case: tuple[Schedule, Costs]) -> None:
        schedule, costs = case
        simulation = simulate(schedule, costs)
        timeline = simulation.timeline
        at = _assert_possible(schedule, costs, timeline)
        _assert_nobody_waits_for_nothing(schedule, costs, at)
        for rank, actions in enumerate(schedule.actions):
            assert timeline.busy(rank) == pytest.approx(sum(_duration(a, schedule, costs) for a in actions), abs=TINY)
            assert timeline.span(rank) == pytest.approx(at[actions[-1]].end - at[actions[0]].start, abs=TINY)
        assert timeline.makespan == pytest.approx(max(event.end for event in at.values()), abs=TINY)
        assert timeline.makespan >= _lower_bound(schedule, costs) - TINY
        assert timeline.bubble_of_makespan >= -TINY
        assert timeline.bubble_of_span >= -TINY
        assert simulation.peak_bytes == pytest.approx(_peaks(schedule, costs, at))

    holds()


def test_two_ranks_by_hand() -> None:
    """1F1B, 2 micro-batches; F takes 1, B and its weight gradients 2, a message a half."""
    simulation = simulate(make_schedule("1f1b", 2, 2), Costs.uniform(2, message=0.5))
    timeline = simulation.timeline
    times = [[(e.kind, e.microbatch, e.start, e.end) for e in timeline.events if e.rank == rank] for rank in (0, 1)]
    assert [time for time in times[0] if time[0] != "send"] == [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 5, 7), ("B", 1, 8, 10)]
    assert [time for time in times[1] if time[0] != "send"] == [
        ("F", 0, 1.5, 2.5),
        ("B", 0, 2.5, 4.5),
        ("F", 1, 4.5, 5.5),
        ("B", 1, 5.5, 7.5),
    ]
    # at the receiver, from the end of the sender's action to the arrival
    assert [time for time in times[0] if time[0] == "send"] == [("send", 0, 4.5, 5), ("send", 1, 7.5, 8)]
    assert [time for time in times[1] if time[0] == "send"] == [("send", 0, 1, 1.5), ("send", 1, 2, 2.5)]
    assert (timeline.makespan, timeline.span(0), timeline.span(1), timeline.busy(0), timeline.busy(1)) == (10, 10, 6, 6, 6)
    assert timeline.bubble_of_span == timeline.bubble_of_makespan == pytest.approx(4 / 6)
    assert simulation.peak_bytes == (2, 1)


def test_split_backward_by_hand() -> None:
    """One rank: 2 F, 3 B, 4 W; what B leaves is freed by W."""
    costs = Costs.uniform(1, 2, 3, 4, 0, held_after_forward=10, held_after_backward=4)
    simulation = simulate(make_schedule("zb_h1", 1, 2), costs)
    assert [(e.kind, e.start, e.end) for e in simulation.timeline.events] == [
        ("F", 0, 2),
        ("B", 2, 5),
        ("W", 5, 9),
        ("F", 9, 11),
        ("B", 11, 14),
        ("W", 14, 18),
    ]
    assert simulation.peak_bytes == (10,)
    assert simulation.timeline.bubble_of_makespan == 0


def test_messages_between_stages_of_one_rank_take_no_time() -> None:
    """The V turns on the last rank: with one rank there is no message at all, with two there are two each way and back."""
    for ranks, messages, idle in ((1, 0, 0), (2, 4, 7)):  # F on 4 stages, B on 4 and the last W, 4 messages: 6 of 13 are busy
        timeline = simulate(make_schedule("zb_v", ranks, 1), Costs.uniform(2 * ranks, message=1)).timeline
        assert sum(event.kind == "send" for event in timeline.events) == messages
        assert timeline.makespan - timeline.busy(0) == idle


def test_the_two_bubbles_differ_where_ranks_start_and_end_at_different_times() -> None:
    """Rank 1 starts after rank 0 and ends after it; neither ever waits in between."""
    events = tuple(Event(rank, "F", rank, mb, rank + mb, rank + mb + 1) for rank in (0, 1) for mb in range(4))
    timeline = Timeline((0, 1), events)
    assert timeline.ranks == 2
    assert (timeline.bubble_of_span, timeline.bubble_of_makespan) == (0, 0.25)


@pytest.mark.parametrize("costs", ["1 : 1 : 1", "1 : 1.1 : 0.8"])
def test_uneven_costs_make_the_bubbles_that_the_page_lists(costs: str) -> None:
    page = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8")
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(("| F : B : W |", f"| {costs} |"))]
    names = [name.strip("`") for name in table[0][1:]]
    published = {"1 : 1 : 1": [".073", ".000", ".089", ".141"], "1 : 1.1 : 0.8": [".098", ".023", ".129", ".286"]}[costs]
    assert names == ["zb_h1", "zb_v", "v_half", "v_min"] and table[1][1:] == published
    for name, bubble in zip(names, published, strict=True):
        schedule = make_schedule(name, 8, 32)
        timeline = simulate(schedule, Costs.uniform(len(schedule.placement), *map(float, costs.split(" : ")))).timeline
        assert timeline.bubble_of_span == pytest.approx(float(bubble), abs=5.1e-4), name


def test_ranks_without_work_have_no_bubble() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 2), Costs((1, 0), (1, 0), (1, 0), 0, (1, 0), (0, 0))).timeline
    assert (timeline.bubble_of_span, timeline.bubble_of_makespan) == (0, 0)
    assert simulate(forward_only((0,), 1), Costs.uniform(1, forward=0)).timeline.bubble_of_makespan == 0


def test_an_evaluation_holds_one_micro_batch_at_a_time() -> None:
    simulation: Simulation = simulate(forward_only((0, 1, 1, 0), 5), Costs.uniform(4, held_after_forward=3))
    assert simulation.peak_bytes == (3, 3)
    assert simulation.timeline.busy(0) == 10


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule's 4 stages"):
        simulate(make_schedule("zb_v", 2, 3), Costs.uniform(2))


def test_a_schedule_that_cannot_run_is_refused() -> None:
    schedule = Schedule((0, 1), 1, ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0))))
    with pytest.raises(ValueError, match="deadlocks"):
        simulate(schedule, Costs.uniform(2))
