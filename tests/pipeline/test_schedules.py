"""The built-in schedules: by hand, by the published formulas and figures, and at any size."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.messages import most_under_way
from megatron_llm.pipeline.schedules import NAMES, Action, Schedule, forward_only, make_schedule, placement
from megatron_llm.pipeline.simulate import Costs, Simulation, simulate

LOOPED = ("interleaved", "breadth_first")
V_SHAPED = ("zb_v", "v_half", "v_min")
fast = settings(max_examples=100, deadline=None)


def chunks(name: str) -> int:
    """Chunks a rank in the tests that take one number for each schedule."""
    return 2 if name in LOOPED + V_SHAPED else 1


def unit_time(schedule: Schedule, ranks: int, forward: float = 1, backward: float = 1, weight: float = 1) -> Simulation:
    """With times and activations of all chunks of a rank together; message 0."""
    stages = len(schedule.placement)
    f, b, w, held = (value * ranks / stages for value in (forward, backward, weight, 1))
    return simulate(schedule, Costs.uniform(stages, f, b, w, 0, held, held))


def as_text(schedule: Schedule) -> list[str]:
    """F0 B0 W0 of the first chunk of a rank, f0 b0 w0 of the second."""
    ranks = len(schedule.actions)
    return [
        " ".join(f"{a.kind if a.stage < ranks else a.kind.lower()}{a.microbatch}" for a in actions)
        for actions in schedule.actions
    ]


# By hand


def test_1f1b_by_hand() -> None:
    """3 stages, 4 micro-batches, as in figure 4 of Narayanan et al. 2021."""
    schedule = make_schedule("1f1b", 3, 4)
    assert as_text(schedule) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert [{action.stage for action in row} for row in schedule.actions] == [{0}, {1}, {2}]


def test_gpipe_by_hand() -> None:
    assert as_text(make_schedule("gpipe", 2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_interleaved_by_hand() -> None:
    """2 ranks of 2 chunks, 4 micro-batches: Megatron's warm-up of 2 (p - r - 1) + (v - 1) p forwards, groups of p."""
    assert as_text(make_schedule("interleaved", 2, 4, 2)) == [
        "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 b2 b3 B2 B3",
        "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3",
    ]


def test_interleaved_with_a_group_that_is_not_full() -> None:
    """Three micro-batches on two ranks: those of four, without the fourth."""
    four, three = (as_text(make_schedule("interleaved", 2, m, 2)) for m in (4, 3))
    assert [" ".join(word for word in row.split() if not word.endswith("3")) for row in four] == three


def test_breadth_first_by_hand() -> None:
    assert as_text(make_schedule("breadth_first", 2, 3, 2)) == ["F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2"] * 2


def test_zb_h1_by_hand() -> None:
    """The first and the last of 4 ranks, at the beginning."""
    rows = as_text(make_schedule("zb_h1", 4, 8))
    assert rows[0].startswith("F0 F1 F2 F3 B0 W0 F4 B1 W1 F5 B2 W2")
    assert rows[3].startswith("F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1")


def test_zb_v_by_hand() -> None:
    """The first of 4 ranks until the steady state, and the last at the beginning."""
    rows = as_text(make_schedule("zb_v", 4, 8))
    assert rows[0].startswith("F0 F1 F2 F3 F4 F5 F6 f0 b0 w0 f1 b1 w1 f2 b2 w2 f3 b3 w3 F7 B0 W0 f4 b4 w4")
    assert rows[3].startswith("F0 f0 F1 f1 F2 f2 F3 f3 b0 w0 F4 B0 W0 f4 b1 w1")


@fast
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 20))
def test_one_chunk_degenerates(ranks: int, microbatches: int) -> None:
    for looped, plain in (("interleaved", "1f1b"), ("breadth_first", "gpipe")):
        assert make_schedule(looped, ranks, microbatches, 1) == make_schedule(plain, ranks, microbatches)


# Published figures. Bubble: idle over busy time of the worst rank in its span; peak: activations of the worst rank.

PUBLISHED = {  # name: bubble and peak with F = B = W = 1 and messages that take no time, (4 ranks, 8 micro-batches) and (8, 32)
    "1f1b": ((0.375, 4), (0.219, 8)),
    "interleaved": ((0.188, 5.5), (0.109, 11.5)),
    "zb_h1": ((0.125, 4), (0.073, 8)),
    "v_half": ((0.104, 3), (0.089, 5)),
    "v_min": ((0.229, 2), (0.141, 4)),
    "zb_v": ((0, 4), (0, 8)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bubble_and_peak(name: str) -> None:
    for size, (bubble, peak) in zip(((4, 8), (8, 32)), PUBLISHED[name], strict=True):
        simulation = unit_time(make_schedule(name, *size, chunks(name)), size[0])
        assert abs(simulation.timeline.bubble_of_span - bubble) <= 0.0005 + 1e-12  # published with three digits
        assert max(simulation.peak_bytes) == peak


def _bubble(name: str, p: int, f: float, b: float, w: float, v: int) -> float:
    """Idle time of the worst rank in its span, for the table in `pipeline/schedules.py`."""
    if name in ("gpipe", "1f1b", *LOOPED):
        return (p - 1) * (f + b + w) / v
    return {"zb_h1": (p - 1) * (f + b - w), "zb_h2": (p - 1) * (f + b - 2 * w), "zb_v": 0}[name]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v"])
def test_bubble_formula_with_unit_costs(name: str) -> None:
    for ranks in range(1, 9):
        for groups in range(2, 5):
            for v in (1, 2, 3) if name in LOOPED else (1,):
                schedule = make_schedule(name, ranks, ranks * groups, v)
                timeline = unit_time(schedule, ranks).timeline
                busy = 3 * ranks * groups
                expected = _bubble(name, ranks, 1, 1, 1, v) / busy
                assert timeline.bubble_of_span == pytest.approx(expected, abs=1e-9), (ranks, groups, v)
                # a barrier at the end of the step adds the time in which the first micro-batch travels to the last rank
                travel = (ranks - 1) / busy * {"zb_h2": 1, "zb_v": 0.5}.get(name, 0)
                assert timeline.bubble_of_makespan == pytest.approx(expected + travel, abs=1e-9), (ranks, groups, v)


@pytest.mark.parametrize(("f", "b", "w"), [(1.0, 1.1, 0.8), (1.0, 2.0, 1.0), (1.0, 1.0, 0.5)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1"])
def test_bubble_formula_with_uneven_costs(name: str, f: float, b: float, w: float) -> None:
    v = chunks(name)
    for ranks, microbatches in ((2, 8), (4, 16), (8, 32)):
        timeline = unit_time(make_schedule(name, ranks, microbatches, v), ranks, f, b, w).timeline
        expected = _bubble(name, ranks, f, b, w, v) / (microbatches * (f + b + w))
        assert timeline.bubble_of_span == pytest.approx(expected), ranks


def test_bubbles_of_v_half_and_v_min_at_many_sizes() -> None:
    """Half-length ticks, two chunks a rank: 3 (p - 1) is half and 4 (p - 1) two thirds of the bubble of 1F1B, 6 (p - 1)."""
    for ranks in range(3, 13):
        for name, most in (("v_half", 3 * (ranks - 1)), ("v_min", 4 * (ranks - 1))):
            timeline = unit_time(make_schedule(name, ranks, 3 * ranks), ranks).timeline
            assert timeline.bubble_of_makespan * 2 * 9 * ranks < most, (name, ranks)


def test_more_memory_is_never_slower_with_few_micro_batches() -> None:
    """Fewer micro-batches than ZB-H2 and ZB-V warm up with: they must not fall behind ZB-H1, and 1F1B not lead."""
    names = ("zb_v", "zb_h2", "zb_h1", "1f1b")
    for ranks in range(1, 9):
        for microbatches in range(1, 2 * ranks):
            schedules = [make_schedule(name, ranks, microbatches) for name in names]
            times = [unit_time(schedule, ranks).timeline.makespan for schedule in schedules]
            assert times == sorted(times), (ranks, microbatches, times)


# Memory


def most_held(name: str, p: int, m: int, v: int) -> list[int]:
    """The stated bound: micro-batches times chunks that each rank holds at once."""
    if name in ("gpipe", "breadth_first"):
        return [m * v] * p
    if name == "1f1b" or (name == "interleaved" and v == 1):
        return [min(m, p - rank) for rank in range(p)]
    if name == "interleaved":
        return [min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) for rank in range(p)]
    if name in ("zb_h1", "zb_h2"):
        return [min(m, p if name == "zb_h1" else 2 * p - 1)] * p
    return [min(2 * m, 2 * {"zb_v": p, "v_half": (p + 2) // 2, "v_min": (p + 4) // 3}[name])] * p


def sizes(name: str) -> st.SearchStrategy[tuple[int, int, int]]:
    """(ranks, micro-batches, virtual stages)"""
    virtual = st.integers(1, 3) if name in LOOPED else st.just(chunks(name))
    return st.tuples(st.integers(1, 7), st.integers(1, 17), virtual)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_within_its_bound(name: str) -> None:
    exact = name not in (*V_SHAPED, "interleaved")

    @settings(max_examples=200, deadline=None)
    @given(sizes(name))
    def holds(size: tuple[int, int, int]) -> None:
        ranks, microbatches, v = size
        peak, bound = check(make_schedule(name, *size)).peak, most_held(name, *size)
        assert all(p <= b for p, b in zip(peak, bound, strict=True))
        if exact or (microbatches >= 2 * ranks and microbatches % ranks == 0):
            assert (list(peak) if exact else max(peak)) == (bound if exact else max(bound))

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_size_up_to_24_ranks(name: str) -> None:
    for ranks in range(1, 25):
        for microbatches in {1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks + 3, 4 * ranks} - {0}:
            peak = check(make_schedule(name, ranks, microbatches, chunks(name))).peak
            assert all(p <= b for p, b in zip(peak, most_held(name, ranks, microbatches, chunks(name)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_large_schedule_is_made_in_seconds(name: str) -> None:
    """64 ranks, 256 micro-batches: up to 98,304 actions; a quadratic loop would take an hour."""
    start = time.process_time()
    schedule = make_schedule(name, 64, 256, chunks(name))
    check(schedule)
    bubble = unit_time(schedule, 64).timeline.bubble_of_span
    assert time.process_time() - start < 60
    assert bubble <= 63 / 256 + 1e-9


# Interface


@fast
@given(st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), sizes(name))))
def test_every_rank_has_the_stages_of_the_placement(case: tuple[str, tuple[int, int, int]]) -> None:
    name, (ranks, microbatches, v) = case
    schedule = make_schedule(name, ranks, microbatches, v)
    owners = placement(name, ranks, v)
    assert schedule.placement == owners
    assert schedule.microbatches == microbatches
    assert schedule.split == name.startswith(("zb", "v_"))
    for rank, actions in enumerate(schedule.actions):
        assert {action.stage for action in actions} == {stage for stage, owner in enumerate(owners) if owner == rank}


def test_placements() -> None:
    assert placement("1f1b", 3) == (0, 1, 2)
    assert placement("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)
    for name in V_SHAPED:
        assert placement(name, 3) == placement(name, 3, 2) == (0, 1, 2, 2, 1, 0)
        assert make_schedule(name, 3, 5) == make_schedule(name, 3, 5, 2)


@fast
@given(owners=st.sampled_from([(0,), (0, 1, 2), (0, 1, 0, 1), (0, 1, 1, 0)]), microbatches=st.integers(1, 9))
def test_forward_only_has_every_forward_and_no_backward(owners: tuple[int, ...], microbatches: int) -> None:
    schedule = forward_only(owners, microbatches)
    assert not schedule.split
    assert max(check(schedule).peak) == 1  # nothing is kept from one forward to the next
    for rank, actions in enumerate(schedule.actions):
        stages = [stage for stage, owner in enumerate(owners) if owner == rank]
        assert sorted(actions) == [Action("F", stage, mb) for stage in stages for mb in range(microbatches)]


@fast
@given(name=st.sampled_from(NAMES), ranks=st.integers(1, 8), v=st.integers(1, 4), microbatches=st.integers(1, 30))
def test_an_evaluation_fills_the_pipeline(name: str, ranks: int, v: int, microbatches: int) -> None:
    """Micro-batches follow each other through several stages a rank as in training, in groups of `ranks` at worst."""
    owners = placement(name, ranks, v if name in LOOPED else 1)
    work = -(-microbatches // ranks) * len(owners)  # of a rank, for the next multiple of `ranks` micro-batches
    makespan = simulate(forward_only(owners, microbatches), Costs.uniform(len(owners))).timeline.makespan
    assert makespan <= work + 2 * (ranks - 1)


def _ends_with_bounded_channels(schedule: Schedule, limit: int) -> bool:
    """Whether all ranks get to their end if a channel holds `limit` messages, and the sender of one more waits.

    A message is out of its channel once the receiver needs it or a later one (receives that are posted ahead only help). Who
    can go on does: what the others wait for cannot be undone by that, so the order of trying is of no effect.
    """
    stages, rows = len(schedule.placement), schedule.actions
    place = {(ends, action): i for ends, messages in schedule.channels.items() for i, action in enumerate(messages)}
    sent, taken = dict.fromkeys(schedule.channels, 0), dict.fromkeys(schedule.channels, 0)
    done: set[Action] = set()
    position, computed = [0] * len(rows), [False] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(rows):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if not computed[rank]:
                    if action.stage:
                        ends = schedule.placement[action.stage - 1], rank
                        if ends[0] == rank and action._replace(stage=action.stage - 1) not in done:
                            break
                        if ends[0] != rank:
                            taken[ends] = max(taken[ends], place[ends, action] + 1)  # the receive is posted, and waits
                            if sent[ends] <= place[ends, action]:
                                break
                    computed[rank] = moved = True
                if (target := action.consumer(stages)) and (ends := (rank, schedule.placement[target.stage]))[1] != rank:
                    if sent[ends] - taken[ends] >= limit:
                        break
                    sent[ends] += 1
                done.add(action)
                position[rank], computed[rank] = position[rank] + 1, False
    return all(at == len(actions) for at, actions in zip(position, rows, strict=True))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_an_evaluation_ends_with_bounded_channels(ranks: int) -> None:
    """With the limit that the runtime uses, and with the two messages that the common clock needs."""
    for owners in (*(tuple(range(ranks)) * v for v in (1, 2, 3, 4)), (*range(ranks), *reversed(range(ranks)))):
        for microbatches in (*range(1, 18), 31, 32, 33, 60):
            schedule = forward_only(owners, microbatches)
            used = most_under_way(schedule)
            assert used is not None and 2 <= used == 2 * len(owners)
            assert _ends_with_bounded_channels(schedule, used) and _ends_with_bounded_channels(schedule, 2), (
                owners,
                microbatches,
            )


@fast
@given(owners=st.lists(st.integers(0, 7), min_size=1, max_size=16), microbatches=st.integers(1, 60))
@example(owners=[1, 0, 0, 0, 1], microbatches=40)
def test_an_evaluation_ends_with_bounded_channels_on_any_placement(owners: list[int], microbatches: int) -> None:
    ranks = sorted(set(owners))
    schedule = forward_only(tuple(map(ranks.index, owners)), microbatches)
    used = most_under_way(schedule)
    assert used is not None and _ends_with_bounded_channels(schedule, used)


def test_channels_are_not_bounded_where_that_may_deadlock() -> None:
    """In training; forwards alone in this order would show why. Two ranks, each all through one stage before the next."""
    assert [most_under_way(make_schedule(name, 2, 4, 1)) for name in NAMES] == [None] * len(NAMES)
    rows = tuple(tuple(Action("F", s, mb) for s in (rank, rank + 2) for mb in range(30)) for rank in range(2))
    breadth_first = Schedule((0, 1, 0, 1), 30, rows)
    check(breadth_first)
    assert not _ends_with_bounded_channels(breadth_first, 8) and _ends_with_bounded_channels(breadth_first, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "no pipeline schedule '2f2b'; the schedules are gpipe, 1f1b, interleaved"),
        (("1f1b", 2, 2, 2), "schedule 1f1b has 1 virtual stage, not 2: .* the schedule to interleaved"),
        (("gpipe", 2, 2, 3), "schedule gpipe has 1 virtual stage, not 3: .* the schedule to breadth_first"),
        (("zb_h1", 2, 2, 2), "schedule zb_h1 has 1 virtual stage, not 2: .* to interleaved or breadth_first"),
        (("v_min", 2, 2, 3), "schedule v_min always has 2 virtual stages, not 3"),
        (("1f1b", 0, 2), "pipeline of 0 ranks"),
        (("interleaved", 2, 2, 0), "0 virtual stages"),
        (("1f1b", 2, 0), "0 micro-batches"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)
