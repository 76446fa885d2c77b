"""torchrun starts lost ranks anew, and the run goes on from its last checkpoint by itself: the same run, on fewer nodes too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.training.run_folder import RunFolder
from tests.ports import free_port
from tests.runs import TINY, config_of
from tests.tiers import slow_among
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.processes import (
    MEETING,
    SECONDS,
    descendants,
    ended,
    insist,
    kill_tree,
    launched,
    lines_of,
    planted,
    ranks_of,
    started,
    wait_for_checkpoint,
    wait_for_steps,
)
from tests.training.test_runs import state_of

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def _until(freed: Path) -> str:
    """What is planted so that a run does not end before a file is there, however late a test comes to make it."""
    return f"while calls > 60 and not os.path.exists({str(freed)!r}): time.sleep(0.05)"


def _last_start(run: Path, starts: int) -> dict[str, Any]:
    """What the run said of its last start, once there were so many."""
    deadline = time.monotonic() + SECONDS
    while lines_of(run / "starts.jsonl") < starts:
        assert time.monotonic() < deadline, f"no {starts} starts within {SECONDS:g} s"
        time.sleep(0.05)
    last: dict[str, Any] = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    return last


def _config(folder: Path, run: str, steps: int = 40, **parallel: int) -> Path:
    schedule = {"lr_schedule": {"kind": "constant"}}
    training = {"training": TINY["training"] | {"steps": steps}, "checkpoint": {"every_steps": 3}, "parallel": parallel}
    return write_config(folder / f"{run}.yaml", TINY | training | schedule | {"logging": {"run_dir": str(folder / run)}})


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_run_is_the_same(tmp_path: Path) -> None:
    run, freed = tmp_path / "lost", tmp_path / "freed"
    script = planted(tmp_path, _until(freed))
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", str(script), "train")
    with launched(*command, str(_config(tmp_path, "lost"))) as torchrun:
        for start, victim in ((1, 1), (2, 0)):
            wait_for_steps(run, _last_start(run, start)["step"] + 4, torchrun)
            wait_for_checkpoint(run, 3, torchrun)
            os.kill(ranks_of(torchrun.pid)[victim], signal.SIGKILL)
        freed.touch()
        log = torchrun.communicate(timeout=SECONDS)[0]
    assert torchrun.returncode == 0, log
    assert log.count("continuing from") == 2 and read_status(run) == {"outcome": "done", "step": 40}
    assert [line["step"] for line in read_metrics(run)] == list(range(41))
    with started(2, _config(tmp_path, "whole")) as ranks:
        assert [code for code, _ in ended(ranks)] == [0, 0]
    expected, actual = (state_of(open_checkpoint(tmp_path / f"{name}/checkpoints/step-00000040")) for name in ("whole", "lost"))
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.slow
def test_a_run_that_was_stopped_is_not_restarted(tmp_path: Path) -> None:
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "megatron_llm", "train")
    with launched(*command, str(_config(tmp_path, "run", 100_000))) as torchrun:
        wait_for_steps(tmp_path / "run", 3, torchrun)
        os.kill(ranks_of(torchrun.pid)[1], signal.SIGUSR1)
        log = torchrun.communicate(timeout=SECONDS)[0]
    assert torchrun.returncode == 0, log
    status = read_status(tmp_path / "run")
    assert status["outcome"] == "stopped" and status["step"] == read_metrics(tmp_path / "run")[-1]["step"]
    assert "continuing from" not in log


@pytest.mark.slow
def test_what_no_restart_can_mend_ends_and_is_said_once_each_time(tmp_path: Path) -> None:
    """Also where rank 0, which says it, is later than another, whose end has torchrun end all."""
    script = tmp_path / "late.py"
    script.write_text(MEETING.format(folder=tmp_path) + "if rank == 0: time.sleep(2)\nsys.exit(main())\n", encoding="utf-8")
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2", str(script), "train")
    with launched(*command, str(_config(tmp_path, "run")), "training.global_batch_size=7") as torchrun:
        log = torchrun.communicate(timeout=SECONDS)[0]
    assert torchrun.returncode == 1 and log.count("training.global_batch_size: 7 is not a multiple of") == 3, log


def _two_nodes(nodes: str, restarts: int, script: Path, config: Path) -> Iterator[tuple[str, ...]]:
    """The commands of two torchruns that meet, of which the first holds the rendezvous."""
    port, last_call = free_port(), 15  # seconds that one which is alone waits for the other, if it may begin alone
    for host in ("true", "false"):
        conf = f"is_host={host},last_call_timeout={last_call},keep_alive_interval=1,keep_alive_max_attempt=3"
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test", "--rdzv-conf", conf)
        size = ("--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", str(restarts))
        yield (*TORCHRUN, *size, *meeting, str(script), "train", str(config))


def _one_of_two_nodes_is_lost(folder: Path, **parallel: int) -> tuple[int, str]:
    """Exit code and log of the node that stays."""
    run, freed = folder / "run", folder / "freed"
    first, second = _two_nodes("1:2", 1, planted(folder, _until(freed)), _config(folder, "run", **parallel))
    with launched(*first) as stays, launched(*second) as lost:
        while _last_start(run, 1)["world_size"] < 2:
            assert stays.poll() is None and lost.poll() is None
            time.sleep(0.1)
        wait_for_checkpoint(run, 3, stays, lost)
        kill_tree(lost.pid)
        freed.touch()
        log = stays.communicate(timeout=SECONDS)[0]
    return stays.returncode, log


@pytest.mark.slow
def test_the_run_goes_on_with_fewer_nodes(tmp_path: Path) -> None:
    code, log = _one_of_two_nodes_is_lost(tmp_path)
    assert code == 0, log
    assert "1 ranks: tp 1, pp 1, dp 1" in log and "continuing from" in log
    assert read_status(tmp_path / "run") == {"outcome": "done", "step": 40}


@pytest.mark.slow
def test_a_layout_that_needs_the_lost_node_ends_with_its_numbers(tmp_path: Path) -> None:
    code, log = _one_of_two_nodes_is_lost(tmp_path, tensor_parallel=2)
    assert code == 1
    assert "context_parallel 1 = 2 does not divide the world size 1; launch a multiple of 2 ranks" in log, log


@pytest.mark.slow
def test_nodes_that_count_restarts_differently_meet_again(tmp_path: Path) -> None:
    """The rank of one node dies while that of the other is at work and notices nothing, so only one agent counts a failure."""
    at_work = (
        f"rank == 0 and calls == 40 and not os.path.exists('{tmp_path}/once') and (open('{tmp_path}/once', 'w'), time.sleep(30))"
    )
    commands = _two_nodes("2", 3, planted(tmp_path, at_work), _config(tmp_path, "run"))
    with launched(*next(commands)) as first, launched(*next(commands)) as second:
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / "once").exists():
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
            time.sleep(0.05)
        holder = next(process for process in (first, second) if _rank_of(ranks_of(process.pid)[0]) == 1)
        os.kill(ranks_of(holder.pid)[0], signal.SIGKILL)
        logs = [process.communicate(timeout=SECONDS)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], logs
    assert read_status(tmp_path / "run") == {"outcome": "done", "step": 40}
    assert sum(log.count("continuing from") for log in logs) == 1


def _rank_of(process: int) -> int:
    return int(psutil.Process(process).environ()["RANK"])


def test_a_restarted_rank_waits_for_the_lock_of_the_one_before(tmp_path: Path) -> None:
    config = config_of(logging={"run_dir": str(tmp_path / "run")})
    with RunFolder(config, 0) as before:
        assert before._lock is not None
        start = time.monotonic()
        threading.Timer(0.5, before._lock.close).start()
        with RunFolder(config, 0, restarted=True):
            assert time.monotonic() - start >= 0.4


def test_a_restart_does_not_begin_anew_what_this_launch_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", str(_config(tmp_path, "run")), "checkpoint.resume=never"]
    run = tmp_path / "run"
    assert main([*arguments, "training.steps=3"]) == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main([*arguments, "training.steps=5"]) == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(6)) and not list(run.glob("*.before-*"))
    os.utime(run / "lock", (0, 0))  # another launch was here
    assert main([*arguments, "training.steps=5"]) == 0
    assert list(run.glob("checkpoints.before-*"))


def _launch(nodes: int, name: str, *arguments: str, **variables: str) -> Any:
    """What starts a launch script, given the port at which nodes meet."""
    script = Path(__file__).resolve().parents[2] / f"examples/torchrun_{name}_node.sh"
    settings = {"PYTHON": sys.executable, "NPROC_PER_NODE": str(2 // nodes)}
    if nodes > 1:
        settings |= {"NNODES": str(nodes), "HEAD_NODE": "localhost", "RDZV_CONF": "last_call_timeout=2"}
    settings |= variables
    return lambda port: launched(str(script), *arguments, HEAD_PORT=str(port), **settings)


@pytest.mark.parametrize("number", slow_among((signal.SIGUSR1, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)))
def test_the_launch_script_of_one_node(tmp_path: Path, number: signal.Signals) -> None:
    config, run = str(_config(tmp_path, "run", 100_000)), tmp_path / "run"
    with _launch(1, "single", config)(0) as script:
        wait_for_steps(run, 3, script)
        script.send_signal(number)
        log = script.communicate(timeout=SECONDS)[0]
    assert script.returncode == 75, log
    step = read_status(run)["step"]
    changed = (f"training.steps={step + 2}", "optimizer.lr=0.005", "--allow-change")
    with _launch(1, "single", config, *changed)(0) as script:
        log = script.communicate(timeout=SECONDS)[0]
        assert script.returncode == 0 and "continuing from" in log, log
    assert read_status(run)["outcome"] == "done"


@pytest.mark.slow
def test_a_request_during_the_start_reaches_the_ranks_when_they_listen(tmp_path: Path) -> None:
    config, run = str(_config(tmp_path, "run", 100_000)), tmp_path / "run"
    with _launch(1, "single", config)(0) as script:
        deadline = time.monotonic() + SECONDS
        while not ranks_of(script.pid):  # they import torch and hear nothing yet
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
        log = script.communicate(timeout=SECONDS)[0]
    assert script.returncode == 75 and read_status(run)["step"] > 0, log


@pytest.mark.slow
def test_a_second_signal_to_the_launch_script_ends_a_run_that_hangs(tmp_path: Path) -> None:
    config, run = str(_config(tmp_path, "run", 100_000)), tmp_path / "run"
    with _launch(1, "single", config)(0) as script:
        wait_for_steps(run, 3, script)
        os.kill(ranks_of(script.pid)[1], signal.SIGSTOP)  # so the other waits for it
        script.send_signal(signal.SIGUSR1)
        time.sleep(4.0)  # sooner it would be the same request
        insist(script, signal.SIGUSR1, gap=30.0)
        log = script.communicate(timeout=SECONDS)[0]  # five seconds after the one that waits the other is killed
    assert script.returncode == 1 and "ended at once by a second signal (SIGUSR1)" in log, log
    assert "continuing from" not in log


@pytest.mark.slow
def test_the_launch_scripts_of_two_nodes(tmp_path: Path) -> None:
    config, run = str(_config(tmp_path, "run", 100_000)), tmp_path / "run"
    node, port = _launch(2, "multi", config), free_port()
    with node(port) as one, node(port) as other:
        wait_for_steps(run, 3, one, other)
        assert descendants(one.pid) and descendants(other.pid)
        other.send_signal(signal.SIGUSR1)
        logs = [script.communicate(timeout=SECONDS)[0] for script in (one, other)]
    assert (one.returncode, other.returncode) == (75, 75), logs
    node, port = _launch(2, "multi", config, f"training.steps={read_status(run)['step'] + 2}"), free_port()
    with node(port) as one, node(port) as other:
        logs = [script.communicate(timeout=SECONDS)[0] for script in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), logs
    assert read_status(run)["outcome"] == "done"


@pytest.mark.slow
def test_nodes_come_and_go_under_the_launch_script(tmp_path: Path) -> None:
    """One alone, two, the second is lost, and comes back: then their agents have counted different restarts."""
    config, run, port = str(_config(tmp_path, "run", 100_000)), tmp_path / "run", free_port()
    conf = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    node = _launch(2, "multi", config, NNODES="1:2", RDZV_CONF=conf)
    with node(port) as stays:
        wait_for_steps(run, 3, stays)
        for time_of_loss in (True, False):
            with node(port) as comes:
                deadline = time.monotonic() + SECONDS
                while not ranks_of(comes.pid):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                wait_for_steps(run, lines_of(run / "metrics.jsonl") + 20, stays, comes)
                if time_of_loss:
                    kill_tree(comes.pid)
                else:
                    comes.send_signal(signal.SIGTERM)
                    logs = [script.communicate(timeout=SECONDS)[0] for script in (stays, comes)]
                    assert (stays.returncode, comes.returncode) == (75, 75), logs
    # Not from the logs: of agents on one host torchrun gives rank 0, which writes them, to the one with the lowest pid.
    worlds = [json.loads(line)["world_size"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert worlds in ([1, 2, 1, 2], [1, 2, 2]), logs


def test_a_second_request_reaches_ranks_that_have_heard_the_first_a_moment_ago_in_time() -> None:
    """A busy machine may pass on the first so late that ranks would take the second for the same."""
    common = Path(__file__).resolve().parents[2] / "examples/torchrun_common.sh"
    program = (
        f"source {common}; ranks() {{ echo 11 12; }}; listens() {{ true; }}; kill() {{ echo $EPOCHREALTIME $*; }}; "
        "first=USR1; urgent=$SECONDS; torchrun=10; until [[ -n $ending ]]; do pass_on; sleep 0.5; done"
    )
    said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    times, signals = zip(*(line.split(" ", 1) for line in said), strict=True)
    assert signals == ("-USR1 11", "-USR1 12", *signals[2:4], "-TERM 10") and sorted(signals[2:4]) == ["-USR1 11", "-USR1 12"]
    assert float(times[2]) - float(times[1]) >= 4.0


def test_the_launch_scripts_say_how_they_are_used_and_what_is_wrong(tmp_path: Path) -> None:
    for nodes, name, arguments in ((1, "single", ()), (2, "multi", ()), (1, "single", ("--nproc-per-node", "2"))):
        with _launch(nodes, name, *arguments)(0) as script:
            assert "usage: " in script.communicate(timeout=SECONDS)[0]
        assert script.returncode == 2
    # The status of an earlier run is not taken for that of one that never began.
    config = _config(tmp_path, "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/status.json").write_text('{"outcome": "stopped", "step": 3}')
    with _launch(1, "single", str(config), "optimizer.lr=fast")(0) as script:
        assert "optimizer.lr" in script.communicate(timeout=SECONDS)[0]
    assert script.returncode == 1
