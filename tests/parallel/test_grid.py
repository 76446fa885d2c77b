"""Who sits where on 8 ranks, against tables written by hand; and a group whose peer is gone ends with an error in time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.parallel.grid import Axis, Grid
from tests import ranks
from tests.ranks import RankFailure, run_ranks

AXES = ("pp", "dp", "cp", "tp", "dp_cp", "world", "kv_replica", "tied", "pp_forward", "pp_backward")
EACH_ALONE = [[rank] for rank in range(8)]


def _describe(parallel: dict[str, int], kv_heads: int) -> dict[str, tuple[int, int, tuple[int, ...], float, bool, bool]]:
    """(rank, size, ranks, sum of the world ranks over the group, first, last) of every axis."""
    grid = Grid.build(ParallelConfig(**parallel), kv_heads)
    found = {}
    for name in AXES:
        axis = getattr(grid, name)
        assert axis.name == name and (axis.group is None) == (axis.size == 1)
        total = all_reduce(torch.tensor(float(dist.get_rank())), axis).item()
        found[name] = (axis.rank, axis.size, axis.ranks, total, axis.first, axis.last)
    return found


LAYOUTS: dict[str, tuple[dict[str, int], int, dict[str, list[list[int]]]]] = {
    "pp2 dp2 tp2": (
        {"pipeline_parallel": 2, "tensor_parallel": 2},
        1,  # one KV head: both tp ranks hold it
        {
            "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
            "cp": EACH_ALONE,
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "dp_cp": [[0, 2], [1, 3], [4, 6], [5, 7]],
            "kv_replica": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "tied": [[0, 4], [1, 5], [2, 6], [3, 7]],
        },
    ),
    "dp2 tp4 over 2 kv heads": (
        {"tensor_parallel": 4},
        2,
        {
            "pp": EACH_ALONE,
            "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            "cp": EACH_ALONE,
            "tp": [[0, 1, 2, 3], [4, 5, 6, 7]],
            "dp_cp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            "kv_replica": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "tied": EACH_ALONE,
        },
    ),
    "pp4 dp2": (
        {"pipeline_parallel": 4},
        4,
        {
            "pp": [[0, 2, 4, 6], [1, 3, 5, 7]],
            "dp": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "cp": EACH_ALONE,
            "tp": EACH_ALONE,
            "dp_cp": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "kv_replica": EACH_ALONE,
            "tied": [[0, 6], [1, 7], [2], [3], [4], [5]],  # the middle stages hold no embedding
        },
    ),
    "dp2 cp2 tp2": (
        {"context_parallel": 2, "tensor_parallel": 2},
        2,
        {
            "pp": EACH_ALONE,
            "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
            "cp": [[0, 2], [1, 3], [4, 6], [5, 7]],
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "dp_cp": [[0, 2, 4, 6], [1, 3, 5, 7]],
            "kv_replica": EACH_ALONE,
            "tied": EACH_ALONE,
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_every_axis(layout: str) -> None:
    parallel, kv_heads, expected = LAYOUTS[layout]
    expected = expected | {"world": [list(range(8))], "pp_forward": expected["pp"], "pp_backward": expected["pp"]}
    for rank, found in enumerate(run_ranks(8, _describe, parallel, kv_heads)):
        for name in AXES:
            (mine,) = [ranks for ranks in expected[name] if rank in ranks]
            place, size = mine.index(rank), len(mine)
            assert found[name] == (place, size, tuple(mine), sum(mine), place == 0, place == size - 1), (rank, name)


def _groups_are_separate() -> None:
    """A pipeline has a communicator per direction, so a backward message cannot stand in for a forward one."""
    grid = Grid.build(ParallelConfig(pipeline_parallel=2), 1)
    groups = [grid.pp.group, grid.pp_forward.group, grid.pp_backward.group]
    assert all(a is not b for i, a in enumerate(groups) for b in groups[:i])


def test_pipeline_directions_have_groups_of_their_own() -> None:
    run_ranks(2, _groups_are_separate)


def test_single_process_needs_no_group() -> None:
    for grid in (Grid.single(), Grid.build(ParallelConfig(), 4)):
        assert [getattr(grid, name) for name in AXES] == [Axis(name) for name in AXES]


def test_layout_that_does_not_divide_the_world_is_refused() -> None:
    with pytest.raises(RankFailure, match=r"world size 3 is not divisible by pp 1 \* cp 1 \* tp 2"):
        run_ranks(3, _describe, {"tensor_parallel": 2}, 2)


def _wait_for_absent_peer(timeout: float) -> float:
    """Rank 1 stays alive but does not come: seconds until rank 0 gets an error."""
    dist.barrier()  # the limit is also that on making the group
    grid = Grid.build(ParallelConfig(tensor_parallel=2, timeout_seconds=timeout), 2)
    start = time.monotonic()
    if grid.tp.rank == 1:
        time.sleep(timeout + 1)
        return 0.0
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        all_reduce(torch.ones(3), grid.tp)
    return time.monotonic() - start


def test_collective_whose_peer_stays_away_ends_at_its_timeout() -> None:
    waited, _ = run_ranks(2, _wait_for_absent_peer, 4.0)
    assert 3.6 < waited < 40  # the default group waits for 240 s


def _wait_for_dead_peer(folder: str) -> None:
    grid = Grid.build(ParallelConfig(tensor_parallel=2, timeout_seconds=60), 2)
    all_reduce(torch.ones(3), grid.tp)
    if grid.tp.rank == 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        all_reduce(torch.ones(3), grid.tp)
    (Path(folder) / "error").write_text(f"{time.monotonic() - start} {caught.value}")


def test_collective_whose_peer_dies_ends_at_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 30.0)  # rank 0 has its say, however busy the machine is
    with pytest.raises(RankFailure, match="rank 1 of 2:\nthe process died"):
        run_ranks(2, _wait_for_dead_peer, str(tmp_path))
    seconds, message = (tmp_path / "error").read_text().split(" ", 1)
    assert float(seconds) < 30 and "Connection" in message, message
