"""Folders that several tasks write: the same bytes as by one, in any order, side by side, with tasks that die and come again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.hf.together import Share
from tests.hf.folders import make_folder
from tests.ranks import RankFailure, run_ranks
from tests.training.commands import TORCHRUN, environment

SHARDS = 3
CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink", "fsync", "write")


def killed(arguments: list[str], last: int) -> int:
    """Run a command on a process that is killed at its `last` change of the disk; the exit code, if there are not so many."""
    calls = 0
    plain = {name: getattr(os, name) for name in CHANGES}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain[name](*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(name))
    try:
        return main(arguments)
    finally:
        for name in CHANGES:
            setattr(os, name, plain[name])


def survives(arguments: list[str], last: int) -> bool:
    try:
        (code,) = run_ranks(1, killed, arguments, last)
    except RankFailure as failure:
        assert "died without a traceback" in str(failure), failure
        return False
    assert code == 0
    return True


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a folder. native, out: what one process makes of it."""
    folder = tmp_path_factory.mktemp("sources")
    make_folder(folder / "hf", torch.bfloat16)
    assert main(["import", str(folder / "hf"), str(folder / "native")]) == 0
    assert main(["export", str(folder / "native"), str(folder / "out"), "--shard-size", "8KB"]) == 0
    return folder


def commands(kind: str, sources: Path, output: Path) -> list[list[str]]:
    """The command line of every task."""
    if kind == "import":
        whole = ["import", str(sources / "hf"), str(output)]
    else:
        whole = ["export", str(sources / "native"), str(output), "--shard-size", "8KB"]
    return [[*whole, "--shard", f"{index}/{SHARDS}"] for index in range(SHARDS)]


def assert_equal(kind: str, sources: Path, output: Path) -> None:
    """As one process writes it, and nothing is left beside it."""
    if kind == "import":
        checkpoint, expected = open_checkpoint(output), open_checkpoint(sources / "native")
        checkpoint.verify()
        assert (checkpoint.config, checkpoint.run_state, checkpoint.assets) == (
            expected.config,
            expected.run_state,
            expected.assets,
        )
        assert sorted(path.name for path in output.glob("rank-*")) == [f"rank-{n:05d}.safetensors" for n in range(SHARDS)]
        assert main(["export", str(output), str(output.with_name("again")), "--shard-size", "8KB", "--overwrite"]) == 0
        output = output.with_name("again")
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (sources / "out").iterdir()}
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def start(arguments: list[str], *python: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(python or ("-m", "megatron_llm")), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


KINDS = pytest.mark.parametrize("kind", ["import", "export"])


@KINDS
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_after_the_other(
    tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str], kind: str, order: tuple[int, ...]
) -> None:
    tasks, output = commands(kind, sources, tmp_path / "result"), tmp_path / "result"
    for index in order[:2]:
        assert main(tasks[index]) == 0
        assert not output.exists()
    said = capsys.readouterr().out
    assert f"shard {order[1]}/3 of {output} is written; it appears when the others are: {order[2]}/3" in said
    assert main(tasks[order[0]]) == 0, "a task that has ended has nothing to do"
    assert main(tasks[order[2]]) == 0
    assert_equal(kind, sources, output)
    assert main(tasks[0]) == 1
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert_equal(kind, sources, output)
    for index in order:
        assert main([*tasks[index], "--overwrite"]) == 0
    assert_equal(kind, sources, output)


@KINDS
def test_side_by_side(tmp_path: Path, sources: Path, kind: str) -> None:
    tasks = [start(command) for command in commands(kind, sources, tmp_path / "result")]
    said = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * SHARDS, said
    assert_equal(kind, sources, tmp_path / "result")


def test_ranks_of_torchrun(tmp_path: Path, sources: Path) -> None:
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        str(SHARDS),
        "-m",
        "megatron_llm",
        *commands("export", sources, tmp_path / "result")[0][:-2],
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_equal("export", sources, tmp_path / "result")


@pytest.mark.slow
@KINDS
def test_killed_at_every_change_of_the_disk(tmp_path: Path, sources: Path, kind: str) -> None:
    """Each task is killed ever later until it gets through; what it leaves is never taken for a whole folder."""
    output, parts = tmp_path / "result", tmp_path / ".result.parts"
    for index, command in enumerate(commands(kind, sources, output)):
        number = 1
        while not survives(command, number):
            number += 1
            assert not output.exists() or index == SHARDS - 1
            if output.exists() and not parts.exists():  # killed behind the last change that matters
                break
        assert number > 10
    shutil.rmtree(tmp_path / ".result.parts.gone", ignore_errors=True)
    assert_equal(kind, sources, output)


def test_a_task_killed_while_it_writes_is_repeated(tmp_path: Path, sources: Path) -> None:
    output = tmp_path / "result"
    tasks = commands("export", sources, output)
    assert main(tasks[0]) == 0
    assert not survives(tasks[1], 20)
    parts = tmp_path / ".result.parts"
    assert len(list(parts.glob("task-00001.*"))) == 1 and not (parts / "done-00001.json").exists()
    assert main(tasks[2]) == 0
    assert not output.exists()
    assert main(tasks[1]) == 0
    assert_equal("export", sources, output)


def test_jobs_do_not_mix(tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result"
    tasks = commands("export", sources, output)
    assert main(tasks[0]) == 0
    for other in ([*tasks[1], "--dtype", "fp32"], [*tasks[1][:-1], "1/4"], [*tasks[1], "--shard-size", "9KB"]):
        assert main(other) == 1
        assert f"{tmp_path / '.result.parts'} holds parts of another export" in capsys.readouterr().err
    assert main(["export", str(sources / "native"), str(output), "--to", "megatron", "--shard", "0/2"]) == 1
    assert "a Megatron checkpoint is written by one process" in capsys.readouterr().err
    assert main([*tasks[1][:-1], "3/3"]) == 1
    assert "shard 3/3: the numbers of 3 tasks are 0 to 2" in capsys.readouterr().err
    assert main(["export", str(sources / "native"), str(output), "--shard-size", "8KB"]) == 0, "one process does not mind"


def test_two_processes_of_one_task(tmp_path: Path, sources: Path) -> None:
    """A scheduler may start a task again while the first still lives: one of the two hands in."""
    output = tmp_path / "result"
    tasks = commands("export", sources, output)
    twins = [start(command) for command in (tasks[0], tasks[0], tasks[0])]
    said = [task.communicate(timeout=600)[0] for task in twins]
    codes = [task.returncode for task in twins]
    assert 0 in codes and all(
        code == 0 or "being written by another process" in text for code, text in zip(codes, said, strict=True)
    )
    assert main(tasks[1]) == main(tasks[2]) == 0
    assert_equal("export", sources, output)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_shares(count: int) -> None:
    sizes: list[int] = [50, 1, 1, 0, 7, 3, 9, 9, 9, 2, 0]
    shares = [Share(index, count).of(list(enumerate(sizes)), lambda item: item[1]) for index in range(count)]
    assert [item for share in shares for item in share] == list(enumerate(sizes))
    assert Share(0, 2).of([1, 1, 1, 1], lambda size: size) == [1, 1]
    assert Share(1, 2).of([0, 0], lambda size: size) == []
