"""Whoever is lost is named by all that are left; also in real processes without a launcher, where rank 0 holds the store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megatron_llm.pipeline.messages import PeerLostError
from megatron_llm.training import roll_call
from megatron_llm.training.roll_call import STORE_LOST, RollCall
from tests.launch import launch
from tests.ports import free_port
from tests.runs import config_of
from tests.tiers import slow_among
from tests.training.processes import lines_of, planted

SECONDS = 300  # in which all must have ended; the time limit of collectives is 5


def _start(folder: Path, world: int, **parallel: object) -> list[subprocess.Popen[str]]:
    config = config_of(
        parallel={**parallel, "timeout_seconds": 5.0},
        training={"steps": 100_000},
        logging={"run_dir": str(folder / "run")},
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    port = free_port()
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
    }
    command = [sys.executable, str(planted(folder, "pass")), "train", str(path)]
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]


LOSSES: dict[str, tuple[int, signal.Signals, dict[str, object]]] = {  # rank, how, parallel
    "killed, of the last stage": (2, signal.SIGKILL, {"pipeline_parallel": 3}),
    "stopped, of the middle stage": (1, signal.SIGSTOP, {"pipeline_parallel": 3}),
    "stopped, with the store": (0, signal.SIGSTOP, {"pipeline_parallel": 3}),
    "killed, with the store": (0, signal.SIGKILL, {"pipeline_parallel": 3}),
    "killed, of pp2 dp2": (3, signal.SIGKILL, {"pipeline_parallel": 2}),
    "stopped, of dp4": (3, signal.SIGSTOP, {}),
}


@pytest.mark.parametrize(
    "loss", slow_among(("stopped, of the middle stage", "stopped, with the store", "killed, of pp2 dp2"), LOSSES)
)
def test_who_is_lost_is_named_by_all_others(tmp_path: Path, loss: str) -> None:
    lost, how, parallel = LOSSES[loss]
    world = 3 if parallel == {"pipeline_parallel": 3} else 4
    ranks = _start(tmp_path, world, **parallel)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS
        while lines_of(metrics) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks[lost].send_signal(how)
        said = {rank: process.communicate(timeout=SECONDS)[1] for rank, process in enumerate(ranks) if rank != lost}
    finally:
        for process in ranks:
            process.kill()
    expected = f"rank {lost} of the run gave no sign of life"
    if lost == 0:  # and nobody can be asked
        expected = STORE_LOST
    for rank, text in said.items():
        assert expected in text, f"rank {rank}:\n{text[-3000:]}"


def _verdicts(world: int, errors: dict[int, Exception], silent: Sequence[int] = (), timeout_seconds: float = 5) -> dict[int, str]:
    """What each failing rank is told; the ranks share a store and a process."""
    store = dist.HashStore()
    calls = [RollCall(store.clone(), rank, world, timeout_seconds) for rank in range(world)]
    for rank in silent:
        calls[rank].end()
    with ThreadPoolExecutor(world) as pool:
        asked = {rank: pool.submit(calls[rank].verdict, error) for rank, error in errors.items()}
        said = {rank: future.result() for rank, future in asked.items()}
    for call in calls:
        call.end()
    return said


def test_more_ranks_than_judges_are_told_of_the_silent_one() -> None:
    lost = {rank: PeerLostError("receiving from somebody") for rank in (0, 1, 3, 4, 5, 6, 7)}
    said = _verdicts(8, lost, silent=[2])
    expected = "rank 2 of the run gave no sign of life for 4 s: killed, stopped, or cut off from the network"
    assert set(said.values()) == {expected} and len(said) == 7


def test_who_failed_by_itself_is_named_with_its_reason() -> None:
    lost: dict[int, Exception] = {rank: RuntimeError("gloo: connection closed by peer") for rank in range(5)}
    said = _verdicts(6, {**lost, 5: KeyError("planted")})
    assert said.pop(5) == "", "its own error says it"
    assert set(said.values()) == {"rank 5 failed first: KeyError: 'planted'"}


def test_a_rank_that_lives_and_does_not_go_on_is_named() -> None:
    said = _verdicts(3, {rank: PeerLostError("timed out") for rank in (0, 2)}, timeout_seconds=1)
    assert set(said.values()) == {"only rank 1 of the run left no word: alive, and not going on"}


def test_none_of_its_threads_is_left() -> None:
    """One that lets go of the store in C++ while the interpreter ends would abort a process whose run is done."""
    before = set(threading.enumerate())
    for _ in range(100):
        RollCall(dist.HashStore(), 0, 1, 5.0).end()
        assert set(threading.enumerate()) <= before


class _DeadStore:
    """One whose machine is lost: calls never return."""

    def clone(self) -> _DeadStore:
        return self

    def add(self, key: str, amount: int) -> int:
        threading.Event().wait()
        return amount


def _wait_with_a_dead_store(folder: Path, failing: bool) -> None:
    roll_call.STORE_GRACE_SECONDS, roll_call._STORE_SECONDS, roll_call._BEAT_SECONDS = 1.0, 0.1, 0.1
    call = RollCall(_DeadStore(), 3, 4, timeout_seconds=1.0, report=(folder / "reason").write_text)  # type: ignore[arg-type]
    if failing:  # it says why itself, in limited time
        call._failing.set()
    time.sleep(5.0 if failing else 60.0)
    call.end()


@pytest.mark.parametrize("failing", [False, True])
def test_a_rank_whose_store_does_not_answer_ends_its_process(tmp_path: Path, failing: bool) -> None:
    ended = launch(1, _wait_with_a_dead_store, tmp_path, failing)[0]
    if failing:
        assert ended.code == 0 and not (tmp_path / "reason").exists() and not ended.log
        return
    assert ended.code == 1 and ended.seconds > 2.0, "the limit of an exchange, and a second"
    assert re.fullmatch(rf"no answer for \d+ s: {STORE_LOST}", (tmp_path / "reason").read_text())
    assert f"rank 3: {(tmp_path / 'reason').read_text()}" in ended.log
