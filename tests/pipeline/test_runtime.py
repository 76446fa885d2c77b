"""The runtime on real ranks with a toy stage: the composed function and its gradients, and errors that name their place."""

from __future__ import annotations

import contextlib
import gc
import re
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.runtime import PipelineRuntime
from megatron_llm.pipeline.schedules import Action, Schedule, forward_only, gpipe, one_f_one_b
from tests.ranks import RankFailure, run_ranks

SHAPE = (3, 4)


def _weights(stages: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(stages)]


def _input(microbatch: int) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64).view(SHAPE) * (microbatch + 1)


def _stage(weight: Tensor, stage: int, microbatch: int, x: Tensor) -> Tensor:
    """Not symmetric in stage and micro-batch: any mix-up shows."""
    return torch.tanh(x @ weight + 0.1 * stage + 0.01 * microbatch)


def _loss(y: Tensor, microbatch: int) -> Tensor:
    return y.square().sum() * (microbatch + 2)


def _runtime(ranks: int) -> PipelineRuntime:
    grid = Grid.build(ParallelConfig(pipeline_parallel=ranks, timeout_seconds=20), 1)
    return PipelineRuntime(grid, SHAPE, torch.float64, torch.device("cpu"))


def _train(ranks: int, schedule: Schedule) -> dict[str, Any]:
    """Two steps (nothing may be left over from the first): losses of the last and gradients of the stages seen here."""
    check(schedule)
    last = len(schedule.placement) - 1
    weights, runtime = _weights(last + 1), _runtime(ranks)
    losses: dict[int, float] = {}

    def forward(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        assert (x is None) == (stage == 0)
        y = _stage(weights[stage], stage, microbatch, _input(microbatch) if x is None else x)
        if stage < last:
            return y
        loss = _loss(y, microbatch)
        losses[microbatch] = loss.item()
        return loss

    runtime.run(schedule, forward)
    losses.clear()
    runtime.run(schedule, forward)
    return {"losses": losses, "gradients": [weight.grad for weight in weights]}


def _f(stage: int, mb: int) -> Action:
    return Action("F", stage, mb)


def _b(stage: int, mb: int) -> Action:
    return Action("B", stage, mb)


RING = Schedule(  # two stages a rank, not neighbours
    (0, 1, 0, 1),
    2,
    (
        (_f(0, 0), _f(0, 1), _f(2, 0), _f(2, 1), _b(2, 0), _b(2, 1), _b(0, 0), _b(0, 1)),
        (_f(1, 0), _f(1, 1), _f(3, 0), _b(3, 0), _f(3, 1), _b(3, 1), _b(1, 0), _b(1, 1)),
    ),
)
PAIRS = Schedule(  # two neighbouring stages a rank: some results stay on it
    (0, 0, 1, 1),
    2,
    tuple(
        tuple(action for mb in range(2) for action in (_f(a, mb), _f(a + 1, mb)))
        + tuple(action for mb in range(2) for action in (_b(a + 1, mb), _b(a, mb)))
        for a in (0, 2)
    ),
)
CASES = {
    "one rank": (1, one_f_one_b(1, 3)),
    "1f1b, 2 ranks": (2, one_f_one_b(2, 5)),
    "1f1b, 4 ranks": (4, one_f_one_b(4, 6)),
    "1f1b, fewer micro-batches than ranks": (4, one_f_one_b(4, 2)),
    "gpipe, 2 ranks": (2, gpipe(2, 3)),
    "gpipe, 4 ranks": (4, gpipe(4, 5)),
    "two stages a rank, in a ring": (2, RING),
    "two stages a rank, in pairs": (2, PAIRS),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_composed_function(case: str) -> None:
    ranks, schedule = CASES[case]
    results = run_ranks(ranks, _train, ranks, schedule)
    weights = _weights(len(schedule.placement))
    losses = {}
    for mb in range(schedule.microbatches):
        y = _input(mb)
        for stage, weight in enumerate(weights):
            y = _stage(weight, stage, mb, y)
        loss = _loss(y, mb)
        losses[mb] = loss.item()
        (2 * loss).backward()  # two steps
    assert results[schedule.placement[-1]]["losses"] == pytest.approx(losses, rel=1e-13)
    for stage, weight in enumerate(weights):
        for rank, result in enumerate(results):
            gradient = result["gradients"][stage]
            if schedule.placement[stage] == rank:
                torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-12)
            else:
                assert gradient is None


def _evaluate(ranks: int) -> tuple[list[bool], int, list[float]]:
    """Forward only, with gradients enabled: (does any input ask for one, outputs still alive afterwards, results)."""
    runtime, weights = _runtime(ranks), _weights(ranks)
    alive: list[weakref.ref[Tensor]] = []
    wants: list[bool] = []
    results: list[float] = []

    def forward(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        if x is not None:
            wants.append(x.requires_grad)
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0, "the graph of the micro-batch before is still held"
        y = _stage(weights[stage], stage, microbatch, _input(microbatch) if x is None else x)
        alive.append(weakref.ref(y))
        if stage == ranks - 1:
            results.append(y.sum().item())
        return y

    runtime.run(forward_only(ranks, 4), forward)
    gc.collect()
    return wants, sum(ref() is not None for ref in alive), results


def test_forward_only_keeps_no_graph() -> None:
    results = run_ranks(2, _evaluate, 2)
    assert [wants for wants, _, _ in results] == [[], [False] * 4]
    assert [left for _, left, _ in results] == [0, 0]
    weights = _weights(2)
    expected = [_stage(weights[1], 1, mb, _stage(weights[0], 0, mb, _input(mb))).sum().item() for mb in range(4)]
    assert results[1][2] == pytest.approx(expected, rel=1e-13)


def _fail(ranks: int, schedule: Schedule, where: Action, error: str) -> None:
    runtime, weights = _runtime(ranks), _weights(ranks)

    def forward(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        if Action("F", stage, microbatch) == where:
            time.sleep(0.3)  # the peers reach what they will wait for
            raise {"RuntimeError": RuntimeError, "ValueError": ValueError}[error]("planted")
        y = _stage(weights[stage], stage, microbatch, _input(microbatch) if x is None else x)
        return _loss(y, microbatch) if stage == ranks - 1 else y

    runtime.run(schedule, forward)


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_failing_stage_names_rank_and_action_on_every_rank(ranks: int, error: str) -> None:
    """The error keeps its type where it happens; the peers fail in what they were waiting for."""
    last = ranks - 1
    with pytest.raises(RankFailure) as caught:
        run_ranks(ranks, _fail, ranks, one_f_one_b(ranks, 4), _f(last, 1), error, timeout=30)
    message = str(caught.value)
    here = f"pipeline rank {last} failed in F(stage {last}, micro-batch 1)"
    if error == "RuntimeError":
        assert f"RuntimeError: {here}: planted" in message
    else:
        assert f"ValueError: planted\n{here}" in message
    assert re.search(rf"pipeline rank {last - 1} failed in [FB]\(stage {last - 1}, micro-batch \d\)", message)


def test_peer_that_fails_while_the_last_messages_are_sent_is_named() -> None:
    """Rank 0 has done all of its actions and only waits for rank 1 to take the results."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, _fail, 2, forward_only(2, 4), _f(1, 0), "RuntimeError", timeout=30)
    message = str(caught.value)
    assert "pipeline rank 1 failed in F(stage 1, micro-batch 0): planted" in message
    # were rank 0 still at work, it would fail in the action itself
    assert re.search(r"pipeline rank 0 failed (sending the input of F\(stage 1|in F\(stage 0), micro-batch \d\)", message)


def _train_with_blocking_first_messages(ranks: int, schedule: Schedule) -> dict[str, Any]:
    """`_train` on channels like NCCL's: the first message of a pair makes its communicator, and blocks both ends until then."""
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    opened: set[str] = set()

    def opening(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Any:
            pair = f"{group.group_name} {min(me, peer)}-{max(me, peer)}"
            if pair not in opened:
                store.set(f"{pair} {me}", "here")
                store.wait([f"{pair} {peer}"], timedelta(seconds=5))
                opened.add(pair)
            return call(tensor, peer, group=group)

        return wrapped

    with contextlib.ExitStack() as patches:
        for name in ("send", "recv", "isend", "irecv"):
            patches.enter_context(mock.patch.object(dist, name, opening(getattr(dist, name))))
        return _train(ranks, schedule)


@pytest.mark.parametrize("case", ["1f1b, 2 ranks", "1f1b, 4 ranks", "gpipe, 4 ranks"])
def test_first_messages_may_block_until_both_ends_are_there(case: str) -> None:
    ranks, schedule = CASES[case]
    assert len(run_ranks(ranks, _train_with_blocking_first_messages, ranks, schedule)[-1]["losses"]) == schedule.microbatches


class _Delivered:
    """A send that is over as soon as it was asked for."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def _send_at_once(ranks: int) -> int:
    """Most outputs of the first stage that were alive at once, when every send is over by the time of the next."""
    under_way, alive, most = [], [], 0

    def isend(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> _Delivered:
        copy = tensor.clone()
        under_way.append((real(copy, peer, group=group), copy))
        return _Delivered()

    def forward(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        nonlocal most
        y = _input(microbatch) if x is None else x + 1
        alive.append(weakref.ref(y.untyped_storage()))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return y

    real, runtime = dist.isend, _runtime(ranks)
    with mock.patch.object(dist, "isend", isend), torch.no_grad():
        runtime.run(forward_only(ranks, 8), forward)
    for work, _ in under_way:
        work.wait()
    return most


def test_what_was_sent_is_not_held_until_the_end_of_the_step() -> None:
    assert run_ranks(2, _send_at_once, 2)[0] <= 3
