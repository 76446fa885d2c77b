"""The two ends of a channel: messages of one static shape from one pipeline rank to another. Used by `pipeline/runtime.py`.

There is a process group for messages to higher and one for messages to lower pipeline ranks, so between two ranks each carries
one channel. NCCL delivers it in order, whatever other channels wait for, because torch gives every pair of a group that is not
bound to a device a communicator and a stream of its own. Both ends know the whole schedule; receives are posted in the order
of sending, and what arrives before it is needed is kept.

On a CPU receives are posted ahead of their need. On a GPU a receive is a kernel that runs until its message is there, and the
driver loads a kernel at its first use, for which it may wait until nothing runs. A rank that had posted the receive of a gradient
before the forward that the gradient comes of would wait in that forward for ever (seen with CUDA 13.0 on an H200, in the first
step). So a receive is posted there when the action that needs it is next. In a V, whose ranks send and receive in both directions
at both of their stages, it is posted while actions that need no message come before, unless the message depends on those.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.pipeline.actions import Action, Schedule
from megatron_llm.pipeline.check import dependencies, sent_after, walk

_RECEIVES_AHEAD = 2  # of every channel on a CPU, beyond the message that is needed: one travels while another is being used


def most_under_way(schedule: Schedule) -> int | None:
    """How many messages of a channel may be under way before its sender waits; None if a step holds as many anyway.

    Without backwards nothing else keeps a rank from running ahead of a slower one, by a whole evaluation. The limit is what is
    under way at most if all actions take the same time: if one order of events needs no more, none deadlocks (a bounded Kahn
    network). In a loop or a V that is two messages; the rest is slack for ranks that are late.
    """
    if any(action.kind == "B" for actions in schedule.actions for action in actions):
        return None
    starts: dict[Action, int] = {}
    free = [0] * len(schedule.actions)
    for rank, action in walk(schedule):
        needed = dependencies(action, len(schedule.placement))
        starts[action] = max([free[rank], *(starts[other] + 1 for other in needed)])
        free[rank] = starts[action] + 1
    most = 2 * len(schedule.placement)
    for messages in schedule.channels.values():
        taken = list(accumulate(reversed([starts[action] for action in messages]), min))[::-1]  # it, or a later one, is needed
        for place, action in enumerate(messages):
            sent = starts[action._replace(stage=action.stage - 1)] + 1
            most = max(most, place + 1 - bisect_left(taken, sent))
    return most


class PeerLostError(RuntimeError):
    """A message could not be exchanged: the rank at the other end is gone, or later than the time limit."""


def posted_early(schedule: Schedule, rank: int) -> list[tuple[int, Action] | None]:
    """On a GPU, for every action of `rank`: (sender, consuming action) of the receive to post before it, besides its own.

    In a V that trains it is that of the next action that needs one, unless its message depends on actions of `rank` in between.
    """
    actions, placement = schedule.actions[rank], schedule.placement
    if not schedule.split or placement[0] != placement[-1] or len(schedule.actions) == 1:
        return [None] * len(actions)
    after = sent_after(schedule, rank)
    ends = {
        action: (sender, count)
        for sender, counts in after.items()
        for action, count in zip(schedule.channels[sender, rank], counts, strict=True)
    }
    early: list[tuple[int, Action] | None] = []
    needing: Action | None = None
    for index in reversed(range(len(actions))):
        if actions[index] in ends:
            needing = actions[index]
        sender, count = ends[needing] if needing else (0, 0)
        early.append((sender, needing) if needing and count <= index else None)
    return early[::-1]


def axis_of_channel(grid: Grid, sender: int, receiver: int) -> Axis:
    """The axis whose group carries the messages from one pipeline rank to another."""
    return grid.pp_forward if sender < receiver else grid.pp_backward


@contextmanager
def _lost(peer: int, doing: str) -> Iterator[None]:
    """Errors inside mean that the rank at the other end is gone, or too slow."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        raise PeerLostError(f"{doing} pipeline rank {peer}: {str(error) or type(error).__name__}") from error


class Inbox:
    """The receiving end.

    Args:
        sender: pipeline rank at the other end; axis: the channel's.
        messages: the actions that consume the messages of a step, in the order of sending.
        buffer: makes the memory of one message.
        on_host: the messages are in a CPU's memory, and receives are posted ahead.
    """

    def __init__(self, sender: int, axis: Axis, messages: list[Action], buffer: Callable[[], Tensor], on_host: bool):
        self._sender, self._axis, self._messages, self._buffer = sender, axis, messages, buffer
        self._ahead = _RECEIVES_AHEAD if on_host else 0
        self._place = {action: place for place, action in enumerate(messages)}
        self._posted = 0
        self._here: dict[Action, tuple[dist.Work, Tensor]] = {}  # posted and not yet taken
        self._post(self._ahead)

    def _post(self, count: int) -> None:
        """Have the first `count` receives of the step posted."""
        for action in self._messages[self._posted : count]:
            buffer = self._buffer()
            with _lost(self._sender, "receiving from"):
                work = dist.irecv(buffer, self._axis.ranks[self._sender], group=self._axis.group)
            assert work is not None
            self._here[action] = work, buffer
            self._posted += 1

    def ask(self, action: Action) -> None:
        """Post the receive of the message that `action` needs, and of those sent before."""
        self._post(self._place[action] + 1 + self._ahead)

    def take(self, action: Action) -> Tensor:
        """Wait for the message that `action` needs: on a GPU the stream waits, not the host."""
        self.ask(action)
        work, buffer = self._here.pop(action)
        with _lost(self._sender, "receiving from"):
            self._axis.waits.wait(work.wait, buffer.device)
        return buffer


class Outbox:
    """The sending end. A message's memory is held until it has gone, and no longer.

    timeout_seconds: limit on the wait for the receiver, of `finish` and of `send` at its limit.
    limit: how many messages may be under way; None for any number.
    """

    def __init__(self, receiver: int, axis: Axis, timeout_seconds: float, limit: int | None = None):
        self._receiver, self._axis, self._timeout, self._limit = receiver, axis, timeout_seconds, limit
        self._under_way: deque[_StreamSend | _HostSend] = deque()

    def send(self, message: Tensor) -> None:
        """Begin to send; returns at once, unless as many are under way as may be: then the oldest is waited for.

        On a GPU the stream waits, not the host.
        """
        while self._limit is not None and len(self._under_way) >= self._limit:
            self._wait_for_first()
        with _lost(self._receiver, "sending to"):
            work = dist.isend(message, self._axis.ranks[self._receiver], group=self._axis.group)
        assert work is not None
        self._axis.traffic.add("message", message)
        self._under_way.append(_HostSend(work, message) if message.device.type == "cpu" else _StreamSend(work, message))

    def release(self) -> None:
        """Let go of messages that have gone. They go in order."""
        while self._under_way and self._under_way[0].is_over():
            self._wait_for_first()

    def finish(self) -> None:
        """Wait until all messages have gone."""
        while self._under_way:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        first = self._under_way.popleft()
        with _lost(self._receiver, "sending to"):
            self._axis.waits.wait(partial(first.wait, self._timeout), first.device)


class _StreamSend:
    """A send in a device's stream, which can be asked whether it is over."""

    def __init__(self, work: dist.Work, message: Tensor):
        self._work, self._message = work, message
        self.device = message.device

    def is_over(self) -> bool:
        return self._work.is_completed()

    def wait(self, timeout_seconds: float) -> None:
        self._work.wait()


class _HostSend:
    """A send by gloo, which learns that it is over only by waiting: a thread does, and lets go of the message.

    A gloo send is over once its receive has been posted, which may be long after; so the time limit is not on the thread's
    wait but on that of whoever needs the result.
    """

    def __init__(self, work: dist.Work, message: Tensor):
        self._over: Future[None] = Future()
        self.device = message.device
        self._thread = threading.Thread(target=self._wait_for, args=(work, message), daemon=True)
        self._thread.start()

    def _wait_for(self, work: dist.Work, message: Tensor) -> None:
        try:
            work.wait(timedelta(days=365))
        except RuntimeError as error:
            self._over.set_exception(error)
        else:
            self._over.set_result(None)

    def is_over(self) -> bool:
        return self._over.done()

    def wait(self, timeout_seconds: float) -> None:
        try:
            self._over.result(timeout_seconds)
        except TimeoutError:
            raise TimeoutError(f"it has taken no message for {timeout_seconds:g} s") from None
        finally:
            if self._over.done():
                self._thread.join()  # it lets go of the work in C++, which must not be when the interpreter ends
