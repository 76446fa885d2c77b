"""What the runtime holds, and how long: outputs until they are sent, inputs until B, gradients until they are sent."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Axis
from megatron_llm.pipeline.messages import Outbox, most_under_way
from megatron_llm.pipeline.runtime import Forward
from megatron_llm.pipeline.schedules import Action, Schedule, forward_only, make_schedule
from tests.pipeline.toy import Toy
from tests.ranks import run_ranks


def _alive(references: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def _left_after_waiting(references: list[weakref.ref]) -> int:
    """How many stay alive although there is all the time to let go of them."""
    deadline = time.monotonic() + 60
    while _alive(references) and time.monotonic() < deadline:
        time.sleep(0.01)
    return _alive(references)


def _unsent(schedule: Schedule) -> list[int]:
    """At each forward after the first, on the first stage: how many earlier outputs are not let go of."""
    toy, outputs, left = Toy(schedule.placement), [], []

    def wrap(forward: Forward) -> Forward:
        def watched(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            if stage == 0 and outputs:
                left.append(_left_after_waiting(outputs))
            y = forward(stage, microbatch, x)
            y = y + 0.0 if y.dim() else y  # tanh keeps its own output for backward; this one nobody needs
            if stage == 0:
                outputs.append(weakref.ref(y.untyped_storage()))
            return y

        return watched

    toy.run(schedule, wrap)
    return left


@pytest.mark.parametrize("schedule", [make_schedule("gpipe", 2, 5), forward_only((0, 1), 5)], ids=["gpipe", "evaluation"])
def test_an_output_is_let_go_of_once_it_is_sent_long_before_its_backward(schedule: Schedule) -> None:
    assert run_ranks(2, _unsent, schedule)[0] == [0, 0, 0, 0]


def _ahead(microbatches: int) -> tuple[int, int]:
    """(most messages that the first rank has unsent, most threads beyond those at the start) while the second rank sleeps."""
    toy, most = Toy((0, 1)), [0, 0]
    threads, store = threading.active_count(), dist.distributed_c10d._get_default_store()

    def wrap(forward: Forward) -> Forward:
        def watched(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            if stage == 1 and microbatch == 0:
                store.wait(["4 unsent"], timedelta(seconds=60))
                time.sleep(0.5)  # in which there could be more
            most[1] = max(most[1], threading.active_count() - threads)
            return forward(stage, microbatch, x)

        return watched

    send = Outbox.send

    def counted(outbox: Outbox, message: Tensor) -> None:
        send(outbox, message)
        if most[0] < 4 <= len(outbox._under_way):
            store.set("4 unsent", "")
        most[0] = max(most[0], len(outbox._under_way))

    with mock.patch.object(Outbox, "send", counted):
        toy.run(forward_only((0, 1), microbatches), wrap)
    return most[0], most[1]


def test_an_evaluation_runs_ahead_of_a_slow_rank_by_a_few_messages_only() -> None:
    under_way, threads = run_ranks(2, _ahead, 100)[0]
    assert under_way == most_under_way(forward_only((0, 1), 100)) == 4
    assert threads <= 20, "of 100; some that are done may be about to end, on a busy machine a few"


def _held_inputs(schedule: Schedule, direct: bool) -> list[tuple[int, int]]:
    """On the last rank, at each W: (inputs of stages whose B is over that are still alive, gradients on inputs).

    direct: the input is an operand of the weight gradient itself, so that the queue has to hold it.
    """
    toy, inputs, counts = Toy(schedule.placement), {}, []
    run = toy.gradients.run

    def spy(key: tuple[int, int]) -> None:
        done = schedule.actions[toy.grid.pp.rank]
        done = done[: done.index(Action("W", *key))]
        over = [inputs[a.stage, a.microbatch] for a in done if a.kind == "B" and (a.stage, a.microbatch) in inputs]
        gc.collect()
        tensors = [tensor for reference in over if (tensor := reference()) is not None]
        counts.append((len(tensors), sum(tensor.grad is not None for tensor in tensors)))
        run(key)

    def wrap(forward: Forward) -> Forward:
        def watched(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            if x is not None:
                inputs[stage, microbatch] = weakref.ref(x)
            return forward(stage, microbatch, x if direct or x is None else x + 0.0)

        return watched

    with mock.patch.object(toy.gradients, "run", spy):
        toy.run(schedule, wrap)
    return counts


@pytest.mark.parametrize("direct", [False, True])
def test_an_input_and_its_gradient_are_let_go_of_after_backward(direct: bool) -> None:
    """The queue keeps the values of x where it needs them, but neither the leaf x nor its gradient."""
    orders = ("F0 F1 F2", "B0 B1 B2 W0 W1 W2")
    rows = [
        tuple(Action(name[0], stage, int(name[1])) for order in orders for name in order.split())  # type: ignore[arg-type]
        for stage in range(2)
    ]
    counts = run_ranks(2, _held_inputs, Schedule((0, 1), 3, tuple(rows)), direct)[1]
    assert counts == [(0, 0)] * 3


# As on a GPU


class _Work:
    """A send in a stream, which is over when the test says so."""

    def __init__(self) -> None:
        self.over = False

    def is_completed(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.over = True


def _outbox(works: list[_Work], limit: int | None = None) -> tuple[Outbox, Callable[[], weakref.ref]]:
    outbox = Outbox(1, Axis("pp_forward", 0, 2, (0, 1)), 1.0, limit)

    def send() -> weakref.ref:
        message = torch.empty(3, device="meta")  # not on the host
        with mock.patch.object(dist, "isend", lambda tensor, peer, group: works[-1]):
            works.append(_Work())
            outbox.send(message)
        return weakref.ref(message)

    return outbox, send


def test_a_send_beyond_the_limit_waits_for_the_oldest() -> None:
    works: list[_Work] = []
    _, send = _outbox(works, limit=2)
    messages = [send() for _ in range(3)]
    assert [work.over for work in works] == [True, False, False] and messages[0]() is None


def test_messages_are_let_go_of_in_order_without_waiting() -> None:
    works: list[_Work] = []
    outbox, send = _outbox(works)
    messages = [send() for _ in range(3)]
    outbox.release()
    assert _alive(messages) == 3 and not works[0].over
    works[0].over = True
    outbox.release()
    assert messages[0]() is None and _alive(messages) == 2 and not works[1].over
    works[2].over = True
    outbox.release()
    assert _alive(messages) == 2, "the one before is under way, so this one cannot have gone"
    outbox.finish()
    assert _alive(messages) == 0 and works[1].over
