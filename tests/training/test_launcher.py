"""What the launcher's variables make of a process. The real srun: tests/slurm."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from megatron_llm.cli.main import main
from megatron_llm.training import launcher
from megatron_llm.training.distributed import pick_device, process_group
from megatron_llm.training.launcher import Launch, first_host, launch_of, port_of
from tests.ports import free_port

# As SLURM 22.05 sets them.
SBATCH = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_LOCALID": "0", "SLURM_NTASKS": "6", "SLURM_PROCID": "0",
}  # fmt: skip
SRUN = SBATCH | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_who_started_a_process_decides_its_rank() -> None:
    alone = Launch(0, 1, 0)
    assert launch_of({}) == alone
    assert launch_of(TORCHRUN) == launch_of(SRUN | TORCHRUN) == Launch(5, 8, 1)
    assert launch_of(SRUN) == Launch(3, 4, 1, "7.2", ("gpu08", port_of(7, 2)))
    assert launch_of(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).world_size == 1


def test_a_shell_with_the_variables_of_slurm_is_one_process() -> None:
    """That of sbatch, with or without a number as a step, and that of salloc on a node of the job."""
    alone = Launch(0, 1, 0)
    assert launch_of(SBATCH) == alone
    for step in (0xFFFFFFFB, 0xFFFFFFFA):
        assert launch_of(SBATCH | {"SLURM_STEP_ID": str(step)}) == alone


def test_the_task_with_the_terminal_of_srun_is_a_rank_and_what_is_typed_into_its_shell_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`srun --pty -n 4 python ...`, to debug rank 0: its other ranks wait for it."""
    first = SRUN | {"SLURM_PTY_PORT": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    monkeypatch.setattr(os, "isatty", lambda number: number == 0)
    for parent, size in (("slurmstepd", 4), ("bash", 1), ("", 1)):
        monkeypatch.setattr(launcher, "_parent", lambda parent=parent: parent)
        assert launch_of(first).world_size == size
    monkeypatch.setattr(os, "isatty", lambda _: False)
    assert launch_of(first).world_size == 4


@pytest.mark.parametrize("mpi", [{"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}])
def test_mpirun_is_refused_unless_it_says_what_torchrun_would(mpi: dict[str, str]) -> None:
    """Its processes inherit SLURM's variables of the daemons that started them, a task a node."""
    for environment in (mpi, SBATCH | mpi, SRUN | mpi):
        with pytest.raises(ValueError, match="mpirun started this process as one of 4, but ranks are told by torchrun or srun"):
            launch_of(environment)
        assert launch_of(environment | TORCHRUN) == Launch(5, 8, 1)
    assert launch_of({name: "1" for name in mpi}) == Launch()
    assert launch_of(SRUN | {"PMI_SIZE": "4"}) == launch_of(SRUN), "srun --mpi=pmi2"


def test_where_ranks_meet_can_be_said() -> None:
    assert launch_of(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}).head == ("10.0.0.1", 12345)
    assert launch_of(SRUN | {"MASTER_PORT": "12345"}).head == ("gpu08", 12345)
    without = {name: value for name, value in SRUN.items() if not name.endswith("NODELIST")}
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST is missing; set MASTER_ADDR"):
        launch_of(without)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("n[007-012,20],login", "n007"),
        ("n[3,5-7]", "n3"),
        ("a1,b[2-3]", "a1"),
        ("rack[2-3]node[05,07-08]", "rack2node05"),
        ("10.0.0.[4-5]", "10.0.0.4"),
        ("gpu-a[1-2]-ib,gpu-b1", "gpu-a1-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_ports_of_steps_and_neighbouring_jobs_differ() -> None:
    ports = {port_of(job, step) for job in range(4_000_000, 4_000_700) for step in range(16)}
    assert len(ports) == 700 * 16 and min(ports) >= 20_000 and max(ports) < 32_768


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "3"}, "the launcher set RANK=3, but not WORLD_SIZE: unset both"),
        ({"WORLD_SIZE": "4"}, "the launcher set WORLD_SIZE=4, but not RANK"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, which is not below WORLD_SIZE=4"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "variable RANK is 'one', which is no number"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4, which is not below SLURM_STEP_NUM_TASKS=4"),
        (SRUN | {"SLURM_LOCALID": ""}, "but not SLURM_LOCALID: pass all variables SLURM_\\* on"),
        ({"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}, "but not SLURM_PROCID and SLURM_NTASKS and SLURM_LOCALID"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "but not SLURM_LOCALID and SLURM_JOB_ID and SLURM_STEP_ID"),
    ],
)
def test_variables_that_are_set_by_halves(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        launch_of(environment)


def test_such_an_error_is_shown_by_every_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "missing.yaml"]) == 1
    assert "error: the launcher set RANK=3, but not WORLD_SIZE" in capsys.readouterr().err


def _be(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun, where it has the number 0; under torchrun a rank without a GPU is one too many."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for visible, environment, number in ((1, SRUN, 0), (2, SRUN, 1), (2, TORCHRUN, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        _be(monkeypatch, environment)
        assert pick_device("auto") == torch.device("cuda", number) and taken.pop() == number
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="local rank 1 has no GPU: 1 visible; start fewer ranks per node$"):
        pick_device("auto")
    _be(monkeypatch, SRUN | {"SLURM_LOCALID": "2"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # those near its cores, by --gpu-bind=closest
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 visible; .* or --gpu-bind=none"):
        pick_device("auto")


def test_ranks_that_do_not_meet_say_where_they_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", free_port()))  # which no other test gets later
        other.listen()
        port = str(other.getsockname()[1])
        _be(monkeypatch, SRUN | {"SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with (
            pytest.raises(ValueError, match=rf"step 7.2 of SLURM\) cannot listen at port {port}: set MASTER_PORT"),
            process_group(torch.device("cpu"), 1.0),
        ):
            pytest.fail("a group was made")
    _be(monkeypatch, SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})  # nobody listens there any more
    with (
        pytest.raises(
            ValueError, match=rf"rank 3 of 4 .* did not reach rank 0 at 127.0.0.1:{port} within 1 s: (.|\n)*MASTER_ADDR"
        ),
        process_group(torch.device("cpu"), 1.0),
    ):
        pytest.fail("a group was made")
