"""A signal to any rank, or the clock, has the run saved and stopped on all; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_llm.cli.main import main
from megatron_llm.training import distributed
from megatron_llm.training.signals import StopRequest, time_limit
from tests.launch import launch
from tests.runs import TINY
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.processes import ended, insist, planted, started, wait_for_steps


def _config(folder: Path, steps: int = 100_000) -> Path:
    raw = TINY | {"training": TINY["training"] | {"steps": steps}, "logging": {"run_dir": str(folder / "run")}}
    return write_config(folder / "run.yaml", raw | {"lr_schedule": {"kind": "constant"}})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_rank_receiving_a_signal_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    with started(2, _config(tmp_path)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        ranks[1].send_signal(number)
        said = ended(ranks)
    assert [code for code, _ in said] == [75, 75], said
    status = read_status(tmp_path / "run")
    assert status == {"outcome": "stopped", "step": status["step"], "reason": "another rank was asked to stop"}
    assert status["step"] == read_metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{status['step']:08}/manifest.json").is_file()


# An evaluation of 64 rows comes first: 32 calls on one rank, 16 on each of two. Then the third step hangs.
ONE_HANGS, OF_TWO_HANGS = "calls > 40 and time.sleep(1000)", "rank == 1 and calls > 20 and time.sleep(1000)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_a_run_at_once_that_hangs(tmp_path: Path, number: signal.Signals) -> None:
    with started(1, _config(tmp_path), script=planted(tmp_path, ONE_HANGS)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        ranks[0].send_signal(number)
        ranks[0].send_signal(number)  # the same request, passed on twice
        time.sleep(4.0)
        assert ranks[0].poll() is None
        insist(ranks[0], number, gap=4.0)
        assert ended(ranks)[0][0] == 128 + number
    assert read_status(tmp_path / "run") == {
        "outcome": "failed",
        "reason": f"rank 0: ended at once by a second signal ({number.name})",
    }


def test_two_ranks_that_wait_for_each_other_end_at_once_too(tmp_path: Path) -> None:
    """Rank 0 waits in a collective, where Python runs no signal handlers."""
    with started(2, _config(tmp_path), script=planted(tmp_path, OF_TWO_HANGS)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        insist(ranks[0], signal.SIGTERM, gap=4.0)
        assert ended(ranks[:1])[0][0] == 128 + signal.SIGTERM


def test_sigterm_at_the_limit_that_slurm_warned_of_is_a_first_signal() -> None:
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        _wait(stop)
        time.sleep(3.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert stop.requested and stop.reason == "signal SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


def _hear_the_warning_late() -> int:
    with StopRequest():
        pass
    os.kill(os.getpid(), signal.SIGUSR1)
    return 75


def test_a_warning_that_reaches_a_rank_after_its_end_does_not_change_how_it_ended() -> None:
    assert [ending.code for ending in launch(2, _hear_the_warning_late)] == [75, 75]


def _wait(stop: StopRequest) -> None:
    deadline = time.monotonic() + 60
    while not stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_max_minutes_saves_and_the_next_start_continues(tmp_path: Path) -> None:
    config, run = _config(tmp_path), tmp_path / "run"
    endings = launch(2, main, ["train", str(config), "training.max_minutes=0.1"])
    assert [ending.code for ending in endings] == [75, 75], endings
    assert all(5 < ending.seconds < 200 for ending in endings)
    status = read_status(run)
    assert status["outcome"] == "stopped" and status["step"] > 0
    assert status["reason"] in ("training.max_minutes: 0.1 are over", "another rank was asked to stop")
    assert main(["train", str(config), f"training.steps={status['step'] + 2}"]) == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(status["step"] + 3))


def test_time_counts_from_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    own = time.monotonic() - distributed.launched_at()
    assert 0.5 < own < 24 * 3600, "pytest has been running for a while"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launched")
    assert time.monotonic() - distributed.launched_at() >= own, "the launcher was there before"
    assert time_limit(None, 0.0)[0] is None
    with StopRequest(*time_limit(1.0, time.monotonic() - 55.0)) as stop:
        assert not stop.requested
        _wait(stop)
        assert stop.reason == "training.max_minutes: 1 are over"


@pytest.mark.parametrize(("restarts", "code"), [(None, 75), ("0", 75), ("3", 0)])
def test_a_launcher_that_restarts_must_not_restart_what_was_stopped(
    monkeypatch: pytest.MonkeyPatch, restarts: str | None, code: int
) -> None:
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert distributed.exit_code_of_stopped_run() == code
