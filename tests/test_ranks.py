"""The rank pool itself: results in order, failures with their traceback, nothing hangs, the next job works."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, run_ranks


def _sum_of_ranks(scale: int, *, offset: int = 0) -> tuple[int, int, torch.Tensor, int]:
    total = torch.tensor([float(dist.get_rank() * scale + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total, os.getpid()


def _alone() -> tuple[bool, int]:
    return dist.is_initialized(), torch.get_num_threads()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ZeroDivisionError(f"planted on rank {rank}")
    dist.barrier()


def _sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def _die() -> None:
    os._exit(3)


def _skip() -> None:
    pytest.skip("planted skip")


def _unpicklable() -> object:
    return lambda: None


def _random() -> float:
    return float(torch.rand(()))


def _backward() -> float:
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    dist.all_reduce(x.grad)
    return float(x.grad.sum())


def test_results_come_back_in_rank_order_and_workers_are_reused() -> None:
    first = run_ranks(4, _sum_of_ranks, 10, offset=1)
    assert [(rank, world, total.item()) for rank, world, total, _ in first] == [(rank, 4, 64.0) for rank in range(4)]
    second = run_ranks(2, _sum_of_ranks, 1)
    assert [total.item() for _, _, total, _ in second] == [1.0, 1.0]
    assert [pid for *_, pid in second] == [pid for *_, pid in first[:2]]
    assert len({pid for *_, pid in first} | {os.getpid()}) == 5


def test_one_rank_has_no_process_group_and_one_thread() -> None:
    assert run_ranks(1, _alone) == [(False, 1)]


def test_every_job_starts_from_the_same_seed() -> None:
    assert run_ranks(1, _random) == run_ranks(1, _random)


def test_failing_rank_is_named_with_its_traceback_and_the_next_job_works() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 2 of 4") as caught:
        run_ranks(4, _fail_on, 2)
    assert time.monotonic() - start < 40
    message = str(caught.value)
    assert "ZeroDivisionError: planted on rank 2" in message and "in _fail_on" in message
    assert run_ranks(4, _sum_of_ranks, 1)[0][2].item() == 6.0


def test_hanging_rank_is_ended_with_its_stack_and_the_next_job_works() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="_sleep_on_rank_1"):
        run_ranks(2, _sleep_on_rank_1, timeout=8)
    assert time.monotonic() - start < 40
    assert run_ranks(2, _sum_of_ranks, 1)[0][2].item() == 1.0


def test_dead_rank_skip_and_unpicklable_result_are_failures() -> None:
    with pytest.raises(RankFailure, match="died without a traceback"):
        run_ranks(1, _die)
    with pytest.raises(RankFailure, match="planted skip"):
        run_ranks(1, _skip)
    with pytest.raises(RankFailure, match="_unpicklable"):
        run_ranks(1, _unpicklable)


def test_ranks_can_run_backward_after_the_parent_did() -> None:
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    assert run_ranks(2, _backward) == [12.0, 12.0]


def test_killed_workers_leave_no_process() -> None:
    pids = [pid for *_, pid in run_ranks(2, _sum_of_ranks, 1)]
    with pytest.raises(RankFailure):
        run_ranks(2, _fail_on, 0)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("world", [0, 9])
def test_impossible_world_is_refused(world: int) -> None:
    with pytest.raises(ValueError, match=f"world {world}"):
        run_ranks(world, _alone)


def _priorities_of_gloo() -> set[int]:
    priorities = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text() == "gloo_tcp_loop\n":
                priorities.add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return priorities


def test_threads_of_gloo_that_spin_yield() -> None:
    assert run_ranks(2, _priorities_of_gloo) == [{19}] * 2
