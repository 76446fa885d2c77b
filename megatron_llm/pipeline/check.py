"""Proof that a schedule can run: every action once, dependencies met, no deadlock on in-order channels.

Called by `training/build.py` on the schedule it is about to run, by `pipeline/simulate.py`, and by the tests on thousands
of others.

Messages travel in channels, one per ordered pair of ranks, that deliver in the order of sending, as NCCL and gloo do. The
order is read off the sender's list of actions, and both ends read the same list, so they cannot disagree. A receiver may
need a later message first; it then keeps the earlier ones. What is left to prove is that everything is sent that is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llm.pipeline.actions import KINDS, Action, Schedule


@dataclass(frozen=True)
class Proof:
    """What a checked schedule needs, per rank.

    peak: the most pairs (stage, micro-batch) that are held at once, from F to the end of B, or of W where there is one.
    early: the most messages that wait at once because a later message of their channel is needed first.
    """

    peak: tuple[int, ...]
    early: tuple[int, ...]


def dependencies(action: Action, stages: int) -> list[Action]:
    """What must be finished before an action: the producer of its message (first), its own forward (B), its own backward (W)."""
    kind, stage, mb = action.kind, action.stage, action.microbatch
    if kind == "F":
        return [Action("F", stage - 1, mb)] if stage else []
    if kind == "W":
        return [Action("B", stage, mb)]
    return ([Action("B", stage + 1, mb)] if stage < stages - 1 else []) + [Action("F", stage, mb)]


def walk(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """All actions with their ranks, in one order that the ranks' lists and all dependencies allow.

    Raises ValueError naming what every rank waits for if no rank can go on.
    """
    stages, ranks = len(schedule.placement), len(schedule.actions)
    done: set[Action] = set()
    waiting: dict[Action, int] = {}  # the rank that cannot go on before this is done
    position = [0] * ranks
    ready = list(reversed(range(ranks)))
    while ready:
        rank = ready.pop()
        actions = schedule.actions[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            missing = next((needed for needed in dependencies(action, stages) if needed not in done), None)
            if missing is not None:
                waiting[missing] = rank
                break
            yield rank, action
            position[rank] += 1
            done.add(action)
            if action in waiting:
                ready.append(waiting.pop(action))
    stuck = [
        f"rank {rank} at {actions[position[rank]]}"
        for rank, actions in enumerate(schedule.actions)
        if position[rank] < len(actions)
    ]
    if stuck:
        raise ValueError("the schedule deadlocks: " + ", ".join(stuck))


def sent_after(schedule: Schedule, rank: int) -> dict[int, list[int]]:
    """Per sender, for every message to `rank` in the order of sending: how many actions of `rank` come before it is sent.

    They are those that the message depends on, through messages and through the order in which every rank acts. The next action
    of `rank` may run beside the message, whatever it waits for.
    """
    before: dict[Action, int] = {}  # for an action that has been begun, as above
    last = [0] * len(schedule.actions)  # the same for the last action of each rank
    for actor, action in walk(schedule):
        needed = dependencies(action, len(schedule.placement))
        last[actor] = max([last[actor], *(before[other] for other in needed)])
        if actor == rank:
            last[actor] += 1
        before[action] = last[actor]
    stages = len(schedule.placement)
    return {
        sender: [before[dependencies(action, stages)[0]] for action in messages]
        for (sender, receiver), messages in schedule.channels.items()
        if receiver == rank
    }


def held(schedule: Schedule, after_forward: Sequence[float], after_backward: Sequence[float]) -> tuple[float, ...]:
    """The most that each rank holds at once. It follows from the order of actions alone, whatever they take.

    after_forward: per stage, what is held from the start of F to the end of B (to the end of F if there are no backwards).
    after_backward: per stage, what is held from the end of B to the end of W; of no effect if there are no W.
    """
    stages = len(schedule.placement)
    first = np.asarray(after_forward, dtype=float)
    second = np.asarray(after_backward, dtype=float) if schedule.split else np.zeros(stages)
    forward_only = all(int(rows.max(initial=0)) < stages for rows in schedule.numbers)
    if forward_only:  # nothing is left of an action when it is over
        return tuple(float(first[rows].max(initial=0.0)) for rows in schedule.numbers)
    changes = np.concatenate([first, second - first, -second])
    return tuple(float(changes[rows].cumsum().max(initial=0.0)) for rows in schedule.numbers)


def check(schedule: Schedule) -> Proof:
    """Prove that a schedule runs to its end.

    Raises ValueError naming rank and action if an action is missing, repeated or misplaced, or if no rank can go on.
    """
    _check_complete(schedule)
    for _ in walk(schedule):
        pass
    ones = [1] * len(schedule.placement)
    return Proof(tuple(round(peak) for peak in held(schedule, ones, ones)), _early(schedule))


def _check_complete(schedule: Schedule) -> None:
    """Every action exactly once, on the rank that its stage is placed on; forwards alone, or with B, or with B and W."""
    stages = len(schedule.placement)
    kinds = KINDS if schedule.split else KINDS[:2] if any(a.kind == "B" for row in schedule.actions for a in row) else KINDS[:1]
    seen: set[Action] = set()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind not in KINDS:
                raise ValueError(f"rank {rank}: {action} is of no known kind")
            if not (0 <= action.stage < stages and 0 <= action.microbatch < schedule.microbatches):
                raise ValueError(
                    f"rank {rank}: {action} is out of range of {stages} stages and {schedule.microbatches} micro-batches"
                )
            if action in seen:
                raise ValueError(f"rank {rank}: {action} is repeated")
            if schedule.placement[action.stage] != rank:
                raise ValueError(f"rank {rank}: {action} belongs to rank {schedule.placement[action.stage]}")
            seen.add(action)
    if missing := len(kinds) * stages * schedule.microbatches - len(seen):
        every = (Action(kind, s, mb) for kind in sorted(kinds) for s in range(stages) for mb in range(schedule.microbatches))
        raise ValueError(f"{missing} actions are missing, the first is {next(a for a in every if a not in seen)}")


def _early(schedule: Schedule) -> tuple[int, ...]:
    """`Proof.early`: when a rank takes a message, those sent before it on its channel have arrived, and wait if not yet taken."""
    source: dict[Action, tuple[int, int]] = {}  # consuming action: (sender, place in the channel)
    for (sender, _), messages in schedule.channels.items():
        source.update((action, (sender, place)) for place, action in enumerate(messages))
    result = []
    for actions in schedule.actions:
        arrived: dict[int, int] = {}  # per sender, how many messages must have arrived
        taken = most = 0
        for action in actions:
            if action in source:
                sender, place = source[action]
                arrived[sender] = max(arrived.get(sender, 0), place + 1)
                taken += 1
                most = max(most, sum(arrived.values()) - taken)
        result.append(most)
    return tuple(result)
