"""Disks that are full, may not be written, or fail: the run ends everywhere with the reason, and goes on when it is mended.

A save that fails ends the run on all ranks with exit code 1, and log and status say why. The checkpoint before it stays whole.
The same command then continues from it and ends as the undisturbed run does, to the bit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launch import Ending, launch
from tests.training import faults
from tests.training.blends import SAVING, Job, assert_same_end, assert_whole_ones_are_right, blend, logs, whole_steps
from tests.training.commands import read_status
from tests.training.faults import Fault

BEGUN, LAST = 2, 4  # the run is continued after BEGUN, the save of the next step fails
Make = Callable[..., Job]


class Disk:
    """A small disk in memory, mounted on a folder."""

    def __init__(self, folder: Path):
        self.folder, self.filler = folder, folder / "filler"

    def fill(self, left: int) -> None:
        """Leave `left` free bytes, rounded down to pages."""
        with self.filler.open("wb") as file:
            free = shutil.disk_usage(self.folder).free - left
            file.write(bytes(free - free % os.sysconf("SC_PAGE_SIZE")))

    def make_space(self) -> None:
        self.filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        mount("-o", "remount,ro", str(self.folder))
        try:
            yield
        finally:
            mount("-o", "remount,rw", str(self.folder))


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(done.stderr.strip())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path], Disk]]:
    """Mounts a disk of 4 MiB on a folder, which it makes. Root alone may do so."""
    mounted = []

    def make(folder: Path) -> Disk:
        folder.mkdir(parents=True)
        try:
            mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
        except OSError as error:
            pytest.skip(f"a small disk cannot be mounted here: {error}")
        mounted.append(folder)
        return Disk(folder)

    try:
        yield make
    finally:
        for folder in mounted:  # lazily: whatever still uses it, nothing stays mounted
            subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@pytest.fixture(scope="module")
def make(data: Path, more_data: Path) -> Make:
    def job(run: Path, saving: str, **checkpoint: Any) -> Job:
        sections = {"checkpoint": SAVING[saving] | checkpoint, "training": {"steps": LAST}}
        return Job.make(2, blend(data, more_data, run, **sections))

    return job


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make(tmp_path_factory.mktemp("undisturbed") / "run", next(iter(SAVING)), keep_last=1000)
    job.finish()
    return job


def begin(make: Make, run: Path, saving: str) -> Job:
    job = make(run, saving)
    job.finish(f"training.steps={BEGUN}")
    assert whole_steps(job.checkpoints) == [BEGUN - 1, BEGUN]
    return job


def assert_failed(job: Job, undisturbed: Job, endings: list[Ending], reason: str) -> None:
    assert [ending.code for ending in endings] == [1, 1], logs(endings)
    assert reason in endings[0].log + endings[1].log, logs(endings)
    assert whole_steps(job.checkpoints)[-1] == BEGUN
    assert_whole_ones_are_right(job, undisturbed)


def assert_status_says(job: Job, reason: str) -> None:
    status = read_status(job.run)
    assert status["outcome"] == "failed" and reason in status["reason"], status


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("left", [40_000, pytest.param(0, marks=pytest.mark.slow)], ids=["space for a part", "full"])
def test_a_full_disk(make: Make, disk: Any, undisturbed: Job, tmp_path: Path, left: int, saving: str) -> None:
    """A checkpoint takes 160 kB."""
    small = disk(tmp_path / "run/checkpoints")
    job = begin(make, tmp_path / "run", saving)
    small.fill(left)
    assert_failed(job, undisturbed, job.start(), "No space left on device")
    assert_status_says(job, "No space left on device")
    small.make_space()
    job.finish()
    assert_same_end(job, undisturbed, LAST)


def test_a_full_disk_with_all_of_the_run_on_it(make: Make, disk: Any, undisturbed: Job, tmp_path: Path) -> None:
    """The status may not be written either; exit code and log still say it, and nothing is lost."""
    small = disk(tmp_path / "disk")
    job = begin(make, tmp_path / "disk/run", "in the background")
    small.fill(40_000)
    assert_failed(job, undisturbed, job.start(), "No space left on device")
    small.make_space()
    job.finish()
    assert_same_end(job, undisturbed, LAST)


@pytest.mark.parametrize("saving", SAVING)
def test_a_disk_that_became_read_only(make: Make, disk: Any, undisturbed: Job, tmp_path: Path, saving: str) -> None:
    small = disk(tmp_path / "run/checkpoints")
    job = begin(make, tmp_path / "run", saving)
    with small.read_only():
        endings = job.start()
        assert_failed(job, undisturbed, endings, "Read-only file system")
    assert_status_says(job, "Read-only file system")
    job.finish()
    assert_same_end(job, undisturbed, LAST)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(make: Make, undisturbed: Job, tmp_path: Path) -> None:
    job = begin(make, tmp_path / "run", "in the background")
    job.checkpoints.chmod(0o555)
    try:
        assert_failed(job, undisturbed, job.start(), "Permission denied")
    finally:
        job.checkpoints.chmod(0o755)
    assert_status_says(job, "Permission denied")
    job.finish()
    assert_same_end(job, undisturbed, LAST)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize(
    "rank, call, error",
    [
        (1, "fsync", "EIO"),
        pytest.param(0, "fsync", "EIO", marks=pytest.mark.slow),
        pytest.param(0, "replace", "EDQUOT", marks=pytest.mark.slow),
    ],
)
def test_a_call_that_fails_on_one_rank(
    make: Make, undisturbed: Job, tmp_path: Path, rank: int, call: str, error: str, saving: str
) -> None:
    """What was written may never reach the disk: that is no checkpoint. All ranks end, not only the one that knows it."""
    job = begin(make, tmp_path / "run", saving)
    shutil.copytree(job.run, tmp_path / "copy")
    arguments = [str(job.config)], job.checkpoints, BEGUN + 1
    launch(2, faults.train, *arguments, None)
    calls = [line.split()[0] for line in faults.counted(job.checkpoints, rank)]
    shutil.rmtree(job.run)
    shutil.copytree(tmp_path / "copy", job.run)
    endings = launch(2, faults.train, *arguments, Fault(rank, BEGUN + 1, calls.index(call), error))
    reason = {"EIO": "Input/output error", "EDQUOT": "Disk quota exceeded"}[error]
    assert_failed(job, undisturbed, endings, reason)
    assert_status_says(job, reason)
    job.finish()
    assert_same_end(job, undisturbed, LAST)
