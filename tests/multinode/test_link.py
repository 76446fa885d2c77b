"""Two nodes under the launch script for several: the same run as on one, and what becomes of it when the link is slow or lost."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint.load import open_checkpoint
from tests.multinode.nodes import TwoNodes, two_nodes, why_not
from tests.runs import TINY
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.processes import MEETING, ended, lines_of, started, wait_for_checkpoint, wait_for_steps
from tests.training.test_runs import state_of

pytestmark = pytest.mark.slow

JOIN, ANSWER, LAST_CALL = 20, 10, 1  # seconds that torchrun waits: for machines that do not come, a store, more machines
RENDEZVOUS = f"join_timeout={JOIN},read_timeout={ANSWER},last_call_timeout={LAST_CALL}"
HANG, LOOK = 6, 18  # training.hang_timeout; that the ranks look for the others: docs/robustness.md
START_LOOK = 60  # beyond parallel.timeout_seconds, for a store that does not answer
LONG = 600.0  # for whole runs, seconds where nothing else is at work
SLACK = 90.0  # for processes to end and scripts to see it, on a machine with other work to do


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    if reason := why_not():
        pytest.skip(reason)
    with two_nodes() as both:
        yield both


def _config(folder: Path, run: str, steps: int, **sections: dict[str, Any]) -> Path:
    training = TINY["training"] | {"steps": steps} | sections.pop("training", {})
    logging = {"run_dir": str(folder / run)}
    return write_config(folder / f"{run}.yaml", TINY | {"training": training, "logging": logging, **sections})


def _weights(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    return state_of(open_checkpoint(folder / f"{run}/checkpoints/step-{step:08}"))


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _logs(*scripts: subprocess.Popen[str], seconds: float = LONG) -> list[str]:
    deadline = time.monotonic() + seconds
    return [script.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for script in scripts]


def _lose_the_link(nodes: TwoNodes, config: Path, run: Path, expected: str) -> None:
    """In the middle of a run. Both nodes must end in time and say what was lost and what to do."""
    with (
        nodes.launch(0, str(config), RDZV_CONF=RENDEZVOUS) as first,
        nodes.launch(1, str(config), RDZV_CONF=RENDEZVOUS) as second,
    ):
        wait_for_checkpoint(run, 5, first, second)
        nodes.pull()
        lost = time.monotonic()
        logs = _logs(first, second)
        assert time.monotonic() - lost < HANG + LOOK + JOIN + ANSWER + LAST_CALL + SLACK
    assert (first.returncode, second.returncode) == (1, 1), logs
    status = read_status(run)
    assert status["outcome"] == "failed" and re.search(expected, status["reason"]), status
    for log in logs:
        assert re.search(expected, log) and ("cut off from the network" in log or "or the network to it" in log), log
        assert log.count(f"the run has failed: {status['reason']}") == 1, log
        assert f"the same command (on each machine) goes on from the last checkpoint of {run}" in log


def test_two_nodes_are_as_one_and_a_slow_link_only_slows_down(nodes: TwoNodes, tmp_path: Path) -> None:
    """Stages on two nodes, each split over the ranks of its node. In the middle the link is lost for a moment, and then slow."""
    parallel, steps = {"tensor_parallel": 2, "pipeline_parallel": 2}, 30
    with started(4, _config(tmp_path, "one", steps, parallel=parallel)) as ranks:
        assert [code for code, _ in ended(ranks, LONG)] == [0] * 4
    config = str(_config(tmp_path, "two", steps, parallel=parallel))
    with nodes.launch(0, config, NPROC_PER_NODE="2") as first, nodes.launch(1, config, NPROC_PER_NODE="2") as second:
        wait_for_steps(tmp_path / "two", 3, first, second)
        nodes.pull()
        time.sleep(1.0)
        nodes.plug()
        slow = nodes.slow_down("netem rate 800kbit") or nodes.slow_down("tbf rate 800kbit burst 2kb limit 1mb")
        slowed_at = lines_of(tmp_path / "two/metrics.jsonl")
        logs = _logs(first, second)
    assert (first.returncode, second.returncode) == (0, 0), logs
    one, two = (read_metrics(tmp_path / run)[1:] for run in ("one", "two"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two] and len(two) == steps
    assert _same(_weights(tmp_path, "one", steps), _weights(tmp_path, "two", steps))
    if not slow:
        pytest.skip("the slow link: tc or this kernel has neither netem nor tbf")
    # What the four micro-batches of a step, 2 x 16 tokens x 32 channels in float64 each, take at least at 100 kB/s.
    slowly = [line["step_seconds"] for line in two[slowed_at + 1 :]]
    assert slowly and min(slowly) > 0.3, slowly


def test_a_lost_link_ends_both_nodes_and_the_same_commands_go_on(nodes: TwoNodes, tmp_path: Path) -> None:
    steps, run = 300, tmp_path / "run"
    with started(2, _config(tmp_path, "whole", steps)) as ranks:
        assert [code for code, _ in ended(ranks, LONG)] == [0, 0]
    config = _config(tmp_path, "run", steps, training={"hang_timeout": HANG}, checkpoint={"every_steps": 5})
    _lose_the_link(nodes, config, run, r"rank \d: no progress for \d+ s after step \d+ \(training.hang_timeout: 6\)")
    nodes.plug()
    with nodes.launch(0, str(config)) as first, nodes.launch(1, str(config)) as second:
        logs = _logs(first, second)
    assert (first.returncode, second.returncode) == (0, 0) and "continuing from" in logs[0] + logs[1], logs
    assert [line["step"] for line in read_metrics(run)] == list(range(steps + 1))
    assert _same(_weights(tmp_path, "whole", steps), _weights(tmp_path, "run", steps))


@pytest.mark.parametrize(
    ("module", "function", "said", "limit"),
    [
        ("torch.distributed", "init_process_group", "the ranks did not meet within 75 s", 3 * 5 + START_LOOK),
        ("megatron_llm.training.loop", "_begin", r"no answer for 6\d s", 5 + START_LOOK),
    ],
)
def test_a_link_that_is_lost_during_the_start_ends_both_ranks(
    nodes: TwoNodes, tmp_path: Path, module: str, function: str, said: str, limit: int
) -> None:
    """Before a function in which one of them waits for an answer from the store of the other."""
    script, pulled = tmp_path / "planted.py", tmp_path / "pulled"
    script.write_text(
        MEETING.format(folder=tmp_path) + f"import pathlib, {module} as module\n"
        f"function = module.{function}\n"
        "def wait(*args, **kwargs):\n"
        f"    pathlib.Path('{tmp_path}/here-' + os.environ['RANK']).touch()\n"
        f"    while not os.path.exists('{pulled}'): time.sleep(0.05)\n"
        "    return function(*args, **kwargs)\n"
        f"module.{function} = wait\n"
        "sys.exit(main())\n",
        encoding="utf-8",
    )
    config = str(_config(tmp_path, "run", 3, parallel={"timeout_seconds": 5.0}))
    with nodes.rank(0, script, "train", config) as first, nodes.rank(1, script, "train", config) as second:
        deadline = time.monotonic() + LONG
        while not all((tmp_path / f"here-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
            time.sleep(0.1)
        nodes.pull()
        pulled.touch()
        logs = _logs(first, second, seconds=limit + SLACK)
    assert (first.returncode, second.returncode) == (1, 1), logs
    assert re.search(f"rank 1: {said}: the store of the run, which .* or the network to it", logs[1]), logs[1]
    assert read_status(tmp_path / "run")["outcome"] == "failed"
