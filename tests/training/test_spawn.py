"""Ranks that a command starts itself: results, errors of every kind, and nothing that waits for ever or lives on."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_llm.training.spawn import run_ranks

pytestmark = pytest.mark.slow  # every rank imports torch


def _add(number: int) -> tuple[np.ndarray, int]:
    if not dist.is_initialized():
        return np.array([number]), 1
    total = torch.tensor([number * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.numpy(), dist.get_world_size()


def _fail(kind: str, rank: int) -> None:
    """On one rank; the others wait for it."""
    if dist.get_rank() == rank:
        if kind == "mistake":
            raise ValueError("the numbers are wrong")
        if kind == "defect":
            raise KeyError("planted")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs":
            time.sleep(1000)
        if kind == "exits":
            os._exit(7)
    dist.all_reduce(torch.ones(1))


def test_the_result_is_that_of_rank_0() -> None:
    assert run_ranks(1, _add, 5, timeout_seconds=120) == (np.array([5]), 1)
    total, world = run_ranks(3, _add, 5, timeout_seconds=120)
    assert total.tolist() == [30] and world == 3
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("mistake", ValueError, r"the numbers are wrong"),
        ("defect", RuntimeError, r"(?s)rank {rank} failed:\nTraceback .*KeyError: 'planted'"),
        ("killed", RuntimeError, r"rank {rank} was killed by SIGKILL; is there enough memory\?"),
        ("exits", RuntimeError, r"rank {rank} ended with exit code 7"),
    ],
)
def test_an_error_of_any_rank_is_the_error(kind: str, error: Any, said: str, rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(error) as caught:
        run_ranks(2, _fail, kind, rank, timeout_seconds=120)
    assert type(caught.value) is error and re.fullmatch(said.format(rank=rank), str(caught.value)), str(caught.value)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 110


def test_a_rank_that_hangs_ends_with_the_limit(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"the ranks took longer than 15 s; give them more time with --timeout"):
        run_ranks(2, _fail, "hangs", 1, timeout_seconds=15)
    assert multiprocessing.active_children() == []
    assert "in _fail" in capfd.readouterr().err  # the stacks
