"""Proof that a schedule can run: every action once, dependencies met, no deadlock on in-order channels.

Called by `training/build.py` on the schedule it is about to run, and by the tests on thousands of others.
"""

from __future__ import annotations

from collections import deque

from megatron_llm.pipeline.schedules import Action, Schedule


def dependencies(action: Action, stages: int) -> list[Action]:
    """What must be finished before an action: its input's producer, and for B its own forward."""
    kind, stage, mb = action.kind, action.stage, action.microbatch
    if kind == "F":
        return [Action("F", stage - 1, mb)] if stage else []
    return [Action("F", stage, mb)] + ([Action("B", stage + 1, mb)] if stage < stages - 1 else [])


def check(schedule: Schedule) -> list[int]:
    """Run the schedule symbolically. Returns the peak number of stage activations each rank holds at once.

    Messages travel in first-in-first-out channels, one per (sender, receiver, direction), as NCCL and gloo deliver
    them; a receiver takes the next message of its channel and it must be the one that its action needs.
    Raises ValueError naming rank and action if an action is missing, repeated or misplaced, if the two ends of a
    channel disagree on the order of messages, or if no rank can go on.
    """
    stages, ranks = len(schedule.placement), len(schedule.actions)
    kinds = {action.kind for actions in schedule.actions for action in actions}
    expected = {Action(kind, stage, mb) for kind in kinds for stage in range(stages) for mb in range(schedule.microbatches)}
    _check_complete(schedule, expected)

    channels: dict[tuple[int, int, str], deque[Action]] = {}
    done: set[Action] = set()
    position, held, peak = [0] * ranks, [0] * ranks, [0] * ranks
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if not _take_inputs(schedule, rank, action, channels, done):
                    break
                done.add(action)
                held[rank] += 1 if action.kind == "F" else -1
                peak[rank] = max(peak[rank], held[rank])
                target = action.stage + (1 if action.kind == "F" else -1)
                if 0 <= target < stages and schedule.placement[target] != rank:
                    channels.setdefault((rank, schedule.placement[target], action.kind), deque()).append(action)
                position[rank] += 1
                progress = True
    stuck = [
        f"rank {rank} at {actions[position[rank]]}"
        for rank, actions in enumerate(schedule.actions)
        if position[rank] < len(actions)
    ]
    if stuck:
        raise ValueError("the schedule deadlocks: " + ", ".join(stuck))
    return peak


def _check_complete(schedule: Schedule, expected: set[Action]) -> None:
    """Every action exactly once, on the rank that its stage is placed on."""
    seen: set[Action] = set()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action in seen or action not in expected:
                raise ValueError(f"rank {rank}: {action} is {'repeated' if action in seen else 'out of range'}")
            if schedule.placement[action.stage] != rank:
                raise ValueError(f"rank {rank}: {action} belongs to rank {schedule.placement[action.stage]}")
            seen.add(action)
    if missing := expected - seen:
        raise ValueError(f"{len(missing)} actions are missing, the first is {min(missing)}")


def _take_inputs(
    schedule: Schedule, rank: int, action: Action, channels: dict[tuple[int, int, str], deque[Action]], done: set[Action]
) -> bool:
    """Whether the inputs of an action are there; takes its message off the channel if it comes from another rank."""
    for needed in dependencies(action, len(schedule.placement)):
        sender = schedule.placement[needed.stage]
        if sender == rank:
            if needed not in done:
                return False
            continue
        channel = channels.get((sender, rank, needed.kind))
        if not channel:
            return False
        if channel[0] != needed:
            raise ValueError(f"rank {rank} expects the result of {needed}, but rank {sender} sends that of {channel[0]} first")
        channel.popleft()
    return True
