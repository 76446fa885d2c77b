"""The one runtime: executes any checked schedule, on gloo and NCCL. Called by `training/step.py`.

It sees stages only as a callable, and messages of one static shape. Receives are posted ahead of the action that needs
them; sends are asynchronous and waited for when nothing can hang on it, because a gloo send completes only once the other
side has posted its receive. There is one process group per direction: NCCL delivers messages of a communicator in
order, and the checker has proved that both ends agree on the order within a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import Action, Schedule

_RECEIVES_AHEAD = 2

Forward = Callable[[int, int, Tensor | None], Tensor]


class PipelineRuntime:
    """Runs the actions of this rank. Making one is collective over the pipeline axis.

    Args:
        grid: for the pipeline axis and its two directional groups.
        shape, dtype, device: of the activations that travel between stages.
    """

    def __init__(self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.grid, self.shape, self.dtype, self.device = grid, shape, dtype, device
        self._open_channels()

    def _open_channels(self) -> None:
        """Send one element from neighbour to neighbour, down the pipeline and up again.

        The first message between two ranks makes their NCCL communicator and blocks both until both are there. In a step
        the receives that are posted ahead would block on messages that depend on what this rank has yet to send.
        """
        pp, token = self.grid.pp, torch.zeros(1, dtype=self.dtype, device=self.device)
        for axis, step in ((self.grid.pp_forward, 1), (self.grid.pp_backward, -1)):
            if 0 <= pp.rank - step < pp.size:
                dist.recv(token, axis.ranks[pp.rank - step], group=axis.group)
            if 0 <= pp.rank + step < pp.size:
                dist.send(token, axis.ranks[pp.rank + step], group=axis.group)

    def run(self, schedule: Schedule, forward: Forward) -> None:
        """Execute one step of `schedule`.

        forward(stage, microbatch, x): output of a stage; x is None on the first stage; the last stage returns the loss
        to backpropagate (a scalar). Raises RuntimeError naming rank and action if a peer fails or a wait times out;
        other errors of `forward` keep their type and get a note that names them.
        """
        _Execution(self, schedule, forward).run()


class _Execution:
    """The state of one step: what is under way and what is held for backward."""

    def __init__(self, runtime: PipelineRuntime, schedule: Schedule, forward: Forward):
        self.runtime, self.schedule, self.forward = runtime, schedule, forward
        self.rank = runtime.grid.pp.rank
        self.actions = schedule.actions[self.rank]
        self.last_stage = len(schedule.placement) - 1
        self.training = any(action.kind == "B" for action in self.actions)
        self.inputs: dict[tuple[int, int], Tensor | None] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.local: dict[Action, Tensor] = {}  # results for a neighbouring stage on this same rank
        self.sends: dict[Action, tuple[dist.Work, Tensor]] = {}  # by the action that consumes what is sent
        self.receives: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.to_post = [action for action in self.actions if self._sender(action) not in (None, self.rank)]

    def _sender(self, action: Action) -> int | None:
        """Pipeline rank that produces the input of an action, None if it needs none."""
        source = action.stage - 1 if action.kind == "F" else action.stage + 1
        return self.schedule.placement[source] if 0 <= source <= self.last_stage else None

    def run(self) -> None:
        for action in self.actions:
            with self._naming(f"in {action}"):
                self._post_receives()
                if action.kind == "F":
                    self._forward(action)
                else:
                    self._backward(action)
        for target in list(self.sends):
            self._finish_send(target)

    def _finish_send(self, target: Action) -> None:
        """Wait for a send, if there was one, and let go of its buffer."""
        if target in self.sends:
            work, _ = self.sends.pop(target)
            with self._naming(f"sending the input of {target}"):
                work.wait()

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Say on which rank and where an error happened, in the message or, to keep its type, in a note."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"pipeline rank {self.rank} failed {where}: {error}") from error
        except Exception as error:
            error.add_note(f"pipeline rank {self.rank} failed {where}")
            raise

    def _post_receives(self) -> None:
        while self.to_post and len(self.receives) < _RECEIVES_AHEAD:
            action = self.to_post.pop(0)
            sender = self._sender(action)
            assert sender is not None
            grid = self.runtime.grid
            axis = grid.pp_forward if action.kind == "F" else grid.pp_backward
            buffer = torch.empty(self.runtime.shape, dtype=self.runtime.dtype, device=self.runtime.device)
            work = dist.irecv(buffer, axis.ranks[sender], group=axis.group)
            assert work is not None
            self.receives[action] = (work, buffer)

    def _receive(self, action: Action) -> Tensor | None:
        """The input of an action: from another rank, from this one, or none."""
        if self._sender(action) is None:
            return None
        if action in self.receives:
            work, buffer = self.receives.pop(action)
            work.wait()
            self._post_receives()
            return buffer
        return self.local.pop(action)

    def _send(self, result: Tensor, target: Action) -> None:
        """Hand a result to the action that consumes it."""
        receiver = self.schedule.placement[target.stage]
        if receiver == self.rank:
            self.local[target] = result
            return
        grid = self.runtime.grid
        axis = grid.pp_forward if target.kind == "F" else grid.pp_backward
        # Gradients sent up, and activations of an evaluation, are answered by no message; gloo does not know when they arrive.
        self.sends = {action: send for action, send in self.sends.items() if not send[0].is_completed()}
        result = result.contiguous()
        assert tuple(result.shape) == self.runtime.shape, (result.shape, self.runtime.shape)
        work = dist.isend(result, axis.ranks[receiver], group=axis.group)
        assert work is not None
        self.sends[target] = (work, result)

    def _forward(self, action: Action) -> None:
        x = self._receive(action)
        if x is not None and self.training:
            x.requires_grad_()
        y = self.forward(action.stage, action.microbatch, x)
        if self.training:
            self.inputs[action.stage, action.microbatch] = x
            self.outputs[action.stage, action.microbatch] = y
        if action.stage < self.last_stage:
            self._send(y.detach(), Action("F", action.stage + 1, action.microbatch))

    def _backward(self, action: Action) -> None:
        dy = self._receive(action)
        # The gradient of an activation proves that it has arrived: its send is over, and its memory can go.
        self._finish_send(Action("F", action.stage + 1, action.microbatch))
        x = self.inputs.pop((action.stage, action.microbatch))
        y = self.outputs.pop((action.stage, action.microbatch))
        torch.autograd.backward(y, dy)
        if x is not None:
            assert x.grad is not None
            self._send(x.grad, Action("B", action.stage - 1, action.microbatch))
