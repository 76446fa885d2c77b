"""A rank that fails, dies or hangs ends the run on all ranks, and all of them say where they were and who it was."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.runtime import Forward
from megatron_llm.pipeline.schedules import Action, Schedule, forward_only, make_schedule
from megatron_llm.training import roll_call
from tests import ranks
from tests.pipeline.toy import Toy
from tests.ranks import RankFailure, run_ranks

SILENCE_SECONDS = 7.0  # a busy machine may keep a rank that lives from saying so for longer than the 4 s of the product
GONE = "the process died without a traceback"


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Let the ranks that are left have their say, however busy the machine is."""
    with mock.patch.object(ranks, "GRACE_SECONDS", 60.0):
        yield


def _end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exits":
        os._exit(0)
    elif how == "hangs":
        store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
        others = [f"roll call, gone {rank}" for rank in range(dist.get_world_size()) if rank != me]
        store.wait(others, timedelta(seconds=60))  # until they have said who it was
        os._exit(0)
    raise {"RuntimeError": RuntimeError, "ValueError": ValueError, "OutOfMemoryError": torch.OutOfMemoryError}[how]("planted")


def _run(schedule: Schedule, where: Action, how: str, timeout_seconds: float) -> None:
    store, world = dist.distributed_c10d._get_default_store(), len(schedule.actions)
    dist.barrier()  # the limit is also that on making the groups
    toy = Toy(schedule.placement, timeout_seconds)

    def wrap(forward: Forward) -> Forward:
        def ending(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            if Action("F", stage, microbatch) == where:
                store.wait([f"at work {rank}" for rank in range(world)], timedelta(seconds=60))
                time.sleep(0.3)  # the peers reach what they will wait for
                _end(how)
            return forward(stage, microbatch, x)

        return ending

    with mock.patch.object(roll_call, "_SILENCE_SECONDS", SILENCE_SECONDS), roll_call.roll_call(timeout_seconds):
        dist.barrier()  # nobody waits for a rank that has yet to begin
        store.set(f"at work {dist.get_rank()}", "")
        toy.run(schedule, wrap)


def _said_by_each(schedule: Schedule, where: Action, how: str, timeout_seconds: float = 60) -> list[str]:
    """What every rank had to say in the end."""
    world = len(schedule.actions)
    with pytest.raises(RankFailure) as caught:
        run_ranks(world, _run, schedule, where, how, timeout_seconds, timeout=120)
    parts = re.split(rf"--- rank (\d) of {world}:\n", str(caught.value))
    said = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    return [said[rank] for rank in range(world)]


@pytest.mark.parametrize(
    ("name", "rank", "stage", "how"),
    [("1f1b", 2, 2, "killed"), ("1f1b", 0, 0, "exits"), ("zb_v", 1, 1, "killed"), ("interleaved", 2, 5, "killed")],
)
def test_all_ranks_name_the_one_that_died(name: str, rank: int, stage: int, how: str) -> None:
    schedule = make_schedule(name, 3, 4, 2 if name == "interleaved" else 1)
    said = _said_by_each(schedule, Action("F", stage, 2), how)
    for other in range(3):
        if other == rank:
            assert said[other].startswith(GONE)
        else:
            rank_is = rf"pipeline rank {other} \(rank {other} of the run\)"
            where = r"(at the start of the step|in [FBW]\(stage \d, micro-batch \d\)|with all actions done)"
            assert re.search(rf"PeerLostError: {rank_is} failed {where}", said[other])
            assert (
                f"\nrank {rank} of the run gave no sign of life for 7 s: killed, stopped, or cut off from the network"
                in said[other]
            )


def test_all_ranks_name_the_one_that_hangs() -> None:
    said = _said_by_each(make_schedule("1f1b", 3, 4), Action("F", 2, 0), "hangs", timeout_seconds=6)
    assert said[2].startswith(GONE)
    assert "pipeline rank 1 (rank 1 of the run) failed in B(stage 1, micro-batch 0), receiving from pipeline rank 2: " in said[1]
    assert "pipeline rank 0 (rank 0 of the run) failed in B(stage 0, micro-batch 0), receiving from pipeline rank 1: " in said[0]
    for message in said[:2]:
        assert "\nonly rank 2 of the run left no word: alive" in message


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError", "OutOfMemoryError"])
def test_an_error_keeps_its_type_and_all_ranks_learn_of_it(error: str) -> None:
    said = _said_by_each(make_schedule("1f1b", 3, 4), Action("F", 2, 1), error)
    here = "pipeline rank 2 (rank 2 of the run) failed in F(stage 2, micro-batch 1)"
    if error == "RuntimeError":
        cause = f"RuntimeError: {here}: planted"
        assert cause in said[2]
    else:
        cause = f"{error}: planted; {here}"
        assert f"{error}: planted\n{here}" in said[2]
    assert "failed first" not in said[2]
    for rank in range(2):
        lost = rf"pipeline rank {rank} \(rank {rank} of the run\) failed in [FB]\(.*\), .* pipeline rank {rank + 1}: "
        assert re.search(lost, said[rank])
        assert f"\nrank 2 failed first: {cause}" in said[rank]


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_peer_that_takes_no_messages_is_named(how: str) -> None:
    """Rank 0 has done all of its actions and only waits for rank 1 to take the results."""
    said = _said_by_each(forward_only((0, 1), 4), Action("F", 1, 0), how, timeout_seconds=6)
    assert said[1].startswith(GONE)
    where = "failed with all actions done, waiting for its messages to be taken, sending to pipeline rank 1: "
    if how == "hangs":
        where += "it has taken no message for 6 s"
    else:  # with little luck rank 0 was still at work
        where = "to pipeline rank 1: "
    assert where in said[0]
    verdict = {"hangs": "only rank 1 of the run left no word: alive", "killed": "rank 1 of the run gave no sign of life for 7 s"}
    assert f"\n{verdict[how]}" in said[0]


def _fail_in_the_second_pipeline() -> str:
    """Four ranks, two replicas; returns what the last rank says."""
    grid = Grid.build(ParallelConfig(pipeline_parallel=2), 1)
    toy = Toy((0, 1), grid=grid)

    def wrap(forward: Forward) -> Forward:
        def failing(stage: int, microbatch: int, x: Tensor | None) -> Tensor:
            if grid.world.rank == 3:
                raise RuntimeError("planted")
            return forward(stage, microbatch, x)

        return failing

    try:
        toy.run(forward_only((0, 1), 1), wrap)
    except RuntimeError as error:
        return str(error)
    return ""


def test_the_rank_of_the_run_is_named_where_it_is_another() -> None:
    said = run_ranks(4, _fail_in_the_second_pipeline)
    assert said[3] == "pipeline rank 1 (rank 3 of the run) failed in F(stage 1, micro-batch 0): planted"
