"""A run that hangs ends by itself, with the stacks of all ranks; one that is only slow goes on."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest

from megatron_llm.cli.main import main
from megatron_llm.training.hang_watch import HangWatch
from tests.runs import TINY
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.processes import ended, planted, started, wait_for_steps

# An evaluation of 64 rows comes first, 16 calls on each of two ranks. Then the third step hangs.
HANG = "rank == 1 and calls > 20 and time.sleep(1000)"


def _config(folder: Path, timeout: float, limit: float = 120.0, **parallel: int) -> Path:
    training = {**TINY["training"], "steps": 100_000, "hang_timeout": timeout}
    raw = TINY | {"training": training, "parallel": {"timeout_seconds": limit, **parallel}}
    return write_config(folder / "run.yaml", raw | {"logging": {"run_dir": str(folder / "run")}})


def test_a_hang_ends_the_run_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    with started(2, _config(tmp_path, 6.0), script=planted(tmp_path, HANG)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        codes, texts = zip(*ended(ranks), strict=True)
    assert codes == (1, 1), texts
    hung, waiting = ((tmp_path / f"run/stacks/rank-0000{rank}.txt").read_text() for rank in (1, 0))
    assert "planted_forward" in hung and "planted_forward" not in waiting
    assert "in train_step" in waiting, f"it waits in the exchange of the gradients or of the sums:\n{waiting}"
    assert "rank 1 (process " in hung and re.search(r"no progress for \d+ s after step", hung + waiting)
    status = read_status(tmp_path / "run")
    assert status["outcome"] == "failed" and f"stack traces of the ranks are in {tmp_path}/run/stacks" in status["reason"]
    assert "training.hang_timeout: 6" in "".join(texts)


@pytest.mark.slow
def test_a_pipeline_whose_rank_hangs_and_one_that_is_stopped(tmp_path: Path) -> None:
    """Stopped as a whole, a rank can write nothing: the others do, and name it."""
    with started(3, _config(tmp_path, 6.0, pipeline_parallel=3)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        said = ended([ranks[0], ranks[2]])
    assert [code for code, _ in said] == [1, 1]
    assert {file.name for file in (tmp_path / "run/stacks").iterdir()} == {"rank-00000.txt", "rank-00002.txt"}
    assert "none of rank 1: killed, stopped, or cut off" in read_status(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_a_shorter_limit_on_exchanges_names_the_rank_and_has_it_write_its_stacks(tmp_path: Path) -> None:
    with started(2, _config(tmp_path, 60.0, limit=5.0), script=planted(tmp_path, HANG)) as ranks:
        wait_for_steps(tmp_path / "run", 3, *ranks)
        (first, _), (second, text) = ended(ranks[:1])[0], ended(ranks[1:])[0]
    assert (first, second) == (1, 1)
    reason = read_status(tmp_path / "run")["reason"]
    assert "only rank 1 of the run left no word: alive, and not going on" in reason, "not what the watch found later"
    stacks = (tmp_path / "run/stacks/rank-00001.txt").read_text()
    assert "another rank has lost one that it waited for" in stacks and "planted_forward" in stacks
    assert re.search(r"no progress for 6\d s", text), "nobody else ended it"


def test_a_slow_run_is_left_alone(tmp_path: Path) -> None:
    """Every forward takes a quarter of the limit, a step and an evaluation take more than it."""
    training = ("training.steps=2", "training.eval_rows=8", "training.eval_every=1")
    raw = TINY | {"training": TINY["training"] | {"hang_timeout": 4.0}, "logging": {"run_dir": str(tmp_path / "run")}}
    config = write_config(tmp_path / "run.yaml", raw)
    with started(1, config, *training, script=planted(tmp_path, "time.sleep(1.05)")) as ranks:
        assert ended(ranks)[0][0] == 0
    assert [line["step_seconds"] > 4.1 for line in read_metrics(tmp_path / "run")[1:]] == [True, True]
    assert not (tmp_path / "run/stacks").exists()


def test_nothing_is_left_of_the_watch_and_none_is_a_choice(tmp_path: Path) -> None:
    raw = TINY | {"logging": {"run_dir": str(tmp_path / "run")}}
    config = str(write_config(tmp_path / "run.yaml", raw))
    before = set(threading.enumerate())
    assert main(["train", config, "training.steps=1"]) == 0
    assert set(threading.enumerate()) <= before
    with HangWatch(0.0) as off:
        off.progress()
        assert set(threading.enumerate()) <= before
