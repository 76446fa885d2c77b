"""The one runtime: executes any checked schedule, on gloo and NCCL. Called by `training/step.py`.

It sees stages only as a callable, and messages of one static shape (`pipeline/messages.py`). Nothing here makes the host wait
for a GPU: a receive is waited for by the stream; sends are asynchronous.

What is held of a micro-batch: from F to B the input of the stage and what its operations saved, but not its output, of
which only the place in the autograd graph is kept; from B to W what `parallel/weight_grad.py` queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.actions import Action, Schedule
from megatron_llm.pipeline.messages import Inbox, Outbox, PeerLostError, axis_of_channel, most_under_way, posted_early
from megatron_llm.pipeline.recorder import EventKind, Recorder
from megatron_llm.pipeline.timeline import Event

Forward = Callable[[int, int, Tensor | None], Tensor]


def _nothing() -> None:
    """What is done after an action when nobody watches."""


class PipelineRuntime:
    """Runs the actions of this rank. Making one is collective over the pipeline axis.

    Args:
        grid: for the pipeline axis and its two directional groups.
        shape, dtype, device: of the activations that travel between stages.
        placement: the pipeline rank of every stage, in all schedules that will run.
        gradients: the queue through which the stages' weights put off their gradients; without one, weight gradients are
            made in B and W finds nothing to do.
        timeout_seconds: limit on waits for sends: at the end of a step, and in an evaluation that is far ahead of a slower
            rank. That on receives is the groups'.

    Attributes:
        before_layer: called with the global index of a layer that is about to run forward, see `DecoderStage.forward`. The other
            event of a step, that a parameter's last gradient is in, is `gradients.on_last`. Communication overlaps on these.
        after_action: called when an action is done, for whoever watches that something goes on.
    """

    def __init__(
        self,
        grid: Grid,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        placement: tuple[int, ...],
        gradients: WeightGradients | None = None,
        timeout_seconds: float = 600.0,
    ):
        self.grid, self.shape, self.dtype, self.device, self.placement = grid, shape, dtype, device, placement
        self.gradients = gradients or WeightGradients(())
        self.timeout_seconds = timeout_seconds
        self.before_layer: Callable[[int], None] | None = None
        self.after_action: Callable[[], None] = _nothing
        self._early: tuple[Schedule, list[tuple[int, Action] | None]] | None = None  # of the last schedule
        self._open_channels()

    def _open_channels(self) -> None:
        """Send one element through every channel.

        The first message between two ranks makes their NCCL communicator and blocks both until both are there. In a step
        the receives that are posted ahead would block on messages that depend on what this rank has yet to send. Here all
        ranks go through the channels in one order, so none blocks for good; pairs that begin with an even rank come first, so
        that neighbours pair off at the same time.
        """
        me, token = self.grid.pp.rank, torch.zeros(1, dtype=self.dtype, device=self.device)
        pairs = {ends for a, b in pairwise(self.placement) if a != b for ends in ((a, b), (b, a))}
        for sender, receiver in sorted(pairs, key=lambda ends: (min(ends) % 2, ends)):
            axis = axis_of_channel(self.grid, sender, receiver)
            if me == sender:
                dist.send(token, axis.ranks[receiver], group=axis.group)
            elif me == receiver:
                dist.recv(token, axis.ranks[sender], group=axis.group)

    def posted_early(self, schedule: Schedule) -> list[tuple[int, Action] | None]:
        """The receives that are posted before every action, besides its own: `messages.posted_early`; none on a CPU."""
        if self._early is None or self._early[0] is not schedule:
            me = self.grid.pp.rank
            nothing: list[tuple[int, Action] | None] = [None] * len(schedule.actions[me])
            self._early = schedule, nothing if self.device.type == "cpu" else posted_early(schedule, me)
        return self._early[1]

    def run(self, schedule: Schedule, forward: Forward, trace: list[Event] | None = None) -> None:
        """Execute one step of `schedule`.

        forward(stage, microbatch, x): output of a stage; x is None on the first stage; the last stage returns the loss
        to backpropagate (a scalar). trace: gets an event for every action of this rank and every wait for a message;
        collective over the grid, so given on all ranks or on none.

        Raises RuntimeError naming rank and action if this rank fails, PeerLostError naming the peer too if it loses one;
        other errors of `forward`, also of subclasses such as torch.OutOfMemoryError, keep their type and get a note that
        names rank and action.
        """
        assert schedule.placement == self.placement, (schedule.placement, self.placement)
        recorder = None if trace is None else Recorder(self.grid, self.device)
        _Execution(self, schedule, forward, recorder).run()
        if trace is not None and recorder is not None:
            trace.extend(recorder.events())


class _Execution:
    """The state of one step: what is under way and what is held for backward."""

    def __init__(self, runtime: PipelineRuntime, schedule: Schedule, forward: Forward, recorder: Recorder | None):
        self.runtime, self.schedule, self.forward, self.recorder = runtime, schedule, forward, recorder
        self.grid, self.gradients, self.rank = runtime.grid, runtime.gradients, runtime.grid.pp.rank
        self.stages = len(schedule.placement)
        self.actions = schedule.actions[self.rank]
        self.training = any(action.kind == "B" for action in self.actions)
        self.inputs: dict[tuple[int, int], Tensor | None] = {}
        self.outputs: dict[tuple[int, int], Tensor | GradientEdge | None] = {}  # None: nothing up to here takes gradients
        self.local: dict[Action, Tensor] = {}  # results for another stage on this same rank
        self.inboxes: dict[int, Inbox] = {}
        self.outboxes: dict[int, Outbox] = {}

    def run(self) -> None:
        if self.training:
            self.gradients.begin_step(self.schedule.microbatches)
        with self._naming("at the start of the step"):
            self._open_boxes()
        act = {"F": self._forward, "B": self._backward, "W": self._weight_gradients}
        for action, early in zip(self.actions, self.runtime.posted_early(self.schedule), strict=True):
            with self._naming(f"in {action}"):
                if early is not None:
                    sender, consumer = early
                    self.inboxes[sender].ask(consumer)
                act[action.kind](action)
                for outbox in self.outboxes.values():
                    outbox.release()
            self.runtime.after_action()
        with self._naming("with all actions done, waiting for its messages to be taken"):
            for outbox in self.outboxes.values():
                outbox.finish()
        assert not (self.inputs or self.outputs or self.local), "the schedule was not checked"
        if self.training:
            self.gradients.end_step()

    def _open_boxes(self) -> None:
        buffer = partial(torch.empty, self.runtime.shape, dtype=self.runtime.dtype, device=self.runtime.device)
        limit = most_under_way(self.schedule)
        for (sender, receiver), messages in self.schedule.channels.items():
            axis = axis_of_channel(self.grid, sender, receiver)
            if receiver == self.rank:
                self.inboxes[sender] = Inbox(sender, axis, messages, buffer, self.runtime.device.type == "cpu")
            elif sender == self.rank:
                self.outboxes[receiver] = Outbox(receiver, axis, self.runtime.timeout_seconds, limit)

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Say on which rank and where an error happened, in the message or, to keep its type, in a note."""
        here = f"pipeline rank {self.rank} (rank {self.grid.pp.ranks[self.rank]} of the run) failed {where}"
        try:
            yield
        except PeerLostError as error:
            raise PeerLostError(f"{here}, {error}") from error
        except Exception as error:
            if type(error) is RuntimeError:
                raise RuntimeError(f"{here}: {error}") from error
            error.add_note(here)
            raise

    def _span(self, kind: EventKind, action: Action) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.span(kind, action)

    def _receive(self, action: Action) -> Tensor | None:
        """The input of an action: from another rank, from this one, or none."""
        source = action.stage - 1 if action.kind == "F" else action.stage + 1
        if not 0 <= source < self.stages:
            return None
        sender = self.schedule.placement[source]
        if sender == self.rank:
            return self.local.pop(action)
        with self._span("send", action):
            return self.inboxes[sender].take(action)

    def _hand_over(self, result: Tensor, action: Action) -> None:
        """Give a result to the action that consumes it, if one does."""
        target = action.consumer(self.stages)
        if target is None:
            return
        receiver = self.schedule.placement[target.stage]
        if receiver == self.rank:
            self.local[target] = result
            return
        made, expected = (tuple(result.shape), result.dtype), (self.runtime.shape, self.runtime.dtype)
        assert made == expected, f"the message is {made}, but all messages are {expected}"
        self.outboxes[receiver].send(result.contiguous())

    def _forward(self, action: Action) -> None:
        x = self._receive(action)
        key = action.stage, action.microbatch
        with self._span("F", action):
            if x is not None and self.training:
                x.requires_grad_()
            y = self.forward(*key, x)
        if self.training:
            self.inputs[key] = x
            # The tensor itself may go as soon as it has been sent. (A loss is a scalar, and is its own root.)
            last = action.stage == self.stages - 1
            self.outputs[key] = None if not y.requires_grad else y if last else get_gradient_edge(y)
        self._hand_over(y.detach(), action)

    def _backward(self, action: Action) -> None:
        dy = self._receive(action)
        key = action.stage, action.microbatch
        x, root = self.inputs.pop(key), self.outputs.pop(key)
        with self._span("B", action), self.gradients.deferred(key) if self.schedule.split else nullcontext():
            if root is not None:
                torch.autograd.backward(root, dy)
        if x is not None:
            assert x.grad is not None
            self._hand_over(x.grad, action)

    def _weight_gradients(self, action: Action) -> None:
        with self._span("W", action):
            self.gradients.run((action.stage, action.microbatch))
