"""kill -9 of a rank at any moment: the next start continues, and the run ends as if nothing had happened, to the bit.

The expected values are those of runs that nobody disturbed: all tensors and the state of every checkpoint that is found after
a kill, and metrics and last checkpoint of the run that went on. First the moments are chosen: every call of a save that changes
files or makes sure of them. Then they are random: in the start, in the loading, in steps and saves.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.training.roll_call import STORE_LOST
from tests.launch import KILLED, Ending, launch
from tests.training import faults
from tests.training.blends import (
    SAVING,
    Job,
    assert_same_end,
    assert_whole_ones_are_right,
    blend,
    contents,
    differences,
    logs,
    whole_steps,
)
from tests.training.faults import Fault

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "pp2": {"pipeline_parallel": 2}}  # with dp2, ZeRO-1: both ranks write
BEGUN, SAVED, LAST = 2, 3, 4  # a run is continued after BEGUN, something happens in the save of SAVED, it ends after LAST
WRITES = 3  # at the beginning and at the end of a file
Make = Callable[..., Job]


@pytest.fixture(scope="module")
def make(data: Path, more_data: Path) -> Make:
    """A job of two ranks in a run folder, by layout and way to save."""

    def job(run: Path, layout: str, saving: str, **checkpoint: Any) -> Job:
        sections = {"checkpoint": SAVING[saving] | checkpoint, "training": {"steps": LAST}, "parallel": LAYOUTS[layout]}
        return Job.make(2, blend(data, more_data, run, **sections))

    return job


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """A run that nothing happens to, with all its checkpoints; made once for each layout."""
    made: dict[str, Job] = {}

    def job(layout: str) -> Job:
        if layout not in made:
            made[layout] = make(tmp_path_factory.mktemp("undisturbed") / "run", layout, next(iter(SAVING)), keep_last=1000)
            made[layout].finish()
        return made[layout]

    return job


@pytest.fixture(scope="module")
def begun(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a run that stands at step BEGUN, to be copied."""
    made: dict[tuple[str, str], Path] = {}

    def run(layout: str, saving: str) -> Path:
        if (layout, saving) not in made:
            job = make(tmp_path_factory.mktemp("begun") / "run", layout, saving)
            job.finish(f"training.steps={BEGUN}")
            made[layout, saving] = job.run
        return made[layout, saving]

    return run


@pytest.fixture
def copied(begun: Callable[[str, str], Path], make: Make, tmp_path: Path) -> Callable[[str, str], Job]:
    """A job that stands at step BEGUN, anew at each call."""

    def job(layout: str, saving: str) -> Job:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(begun(layout, saving), run)
        return make(run, layout, saving)

    return job


def disturbed(job: Job, fault: Fault | None, *overrides: str, grace: float = 0.1) -> list[Ending]:
    """Run the job with a fault in the save of SAVED."""
    return launch(job.world, faults.train, [str(job.config), *overrides], job.checkpoints, SAVED, fault, grace=grace)


def assert_goes_on(job: Job, undisturbed: Job) -> None:
    """After a kill: nothing that looks whole is wrong, there is something to continue from, and it leads to the same end."""
    assert_whole_ones_are_right(job, undisturbed)
    assert whole_steps(job.checkpoints)[-1] >= BEGUN
    job.finish()
    assert_same_end(job, undisturbed, LAST)
    assert_whole_ones_are_right(job, undisturbed)
    left = sorted(path.name for path in job.checkpoints.iterdir())
    assert left == [f"step-{step:08d}" for step in (LAST - 1, LAST)], "what was interrupted is cleaned up"


@pytest.mark.parametrize("saving", SAVING)
def test_every_file_of_a_save_is_seen(copied: Any, saving: str) -> None:
    """What the tests below are worth: the calls that they count are those by which a checkpoint gets to disk."""
    job = copied("dp2", saving)
    assert [ending.code for ending in disturbed(job, None)] == [0, 0]
    for rank in (0, 1):
        file = f"step-{SAVED:08d}/rank-{rank:05d}.safetensors"
        calls = faults.counted(job.checkpoints, rank)
        assert {call.split()[0] for call in calls if call.split()[1].startswith(file)} >= {"open", "write", "fsync", "close"}
        if rank == 0:
            assert sum(call.startswith("replace") and "manifest.json" in call for call in calls) == 1
            manifest = next(number for number, call in enumerate(calls) if call.startswith("replace"))
            assert any(call.startswith("fsync") and "manifest.json" in call for call in calls[:manifest])
            assert any(call.startswith("unlink") and f"step-{BEGUN - 1:08d}" in call for call in calls[manifest:])


MOMENTS = {  # rank, the call that is waited for, how
    "the folder was made": (0, "mkdir", "torn"),
    "a rank's file is to be synced": (1, "fsync", "before"),
    "the manifest is to appear": (0, "replace", "before"),
    "the manifest has appeared": (0, "replace", "torn"),
    "an old checkpoint is half deleted": (0, "unlink", "torn"),
}
COMMITTED = ("the manifest has appeared", "an old checkpoint is half deleted")


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment_of_a_save(copied: Any, undisturbed: Any, moment: str, saving: str) -> None:
    rank, name, how = MOMENTS[moment]
    job = copied("dp2", saving)
    disturbed(job, None)
    calls = [call.split()[0] for call in faults.counted(job.checkpoints, rank)]
    job = copied("dp2", saving)
    endings = disturbed(job, Fault(rank, SAVED, calls.index(name), how))
    assert endings[rank].code == KILLED and not endings[rank].put_down, logs(endings)
    assert (SAVED in whole_steps(job.checkpoints)) == (
        moment in ("the manifest has appeared", "an old checkpoint is half deleted")
    )
    assert_goes_on(job, undisturbed("dp2"))


def _chosen(calls: list[str]) -> list[int]:
    """Numbers of the calls to be killed at: all, but of many writes to a file only the first and the last ones."""
    chosen: list[int] = []
    for _, group in itertools.groupby(range(len(calls)), lambda number: calls[number]):
        numbers = list(group)
        chosen += numbers if len(numbers) <= 2 * WRITES else numbers[:WRITES] + numbers[-WRITES:]
    return chosen


@pytest.mark.parametrize(
    "layout, rank, how, saving",
    [
        pytest.param("dp2", 0, "before", "in the background", marks=pytest.mark.slow),
        pytest.param("dp2", 1, "torn", "in the background", marks=pytest.mark.slow),
        pytest.param("pp2", 1, "before", "in the background", marks=pytest.mark.exhaustive),
        pytest.param("dp2", 0, "torn", "at once", marks=pytest.mark.exhaustive),
        pytest.param("pp2", 1, "torn", "at once", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_call_of_a_save(copied: Any, undisturbed: Any, layout: str, rank: int, how: str, saving: str) -> None:
    expected, newest = undisturbed(layout), set()
    disturbed(job := copied(layout, saving), None)
    calls = faults.counted(job.checkpoints, rank)
    assert calls
    for number in _chosen(calls):
        endings = disturbed(job := copied(layout, saving), Fault(rank, SAVED, number, how))
        assert endings[rank].code == KILLED and not endings[rank].put_down, logs(endings)
        assert len(faults.counted(job.checkpoints, rank)) == number + 1, "it was killed at the call that was meant"
        newest.add(whole_steps(job.checkpoints)[-1])
        assert_goes_on(job, expected)
    assert BEGUN in newest and (rank != 0 or SAVED in newest), "some were before the checkpoint was whole, some after"
    endings = disturbed(job := copied(layout, saving), Fault(rank, SAVED, len(calls), how))
    assert [ending.code for ending in endings] == [0, 0], "that was the last call: who waits for another is not killed"
    assert_same_end(job, expected, LAST)


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("rank", [0, 1])
def test_all_others_end_by_themselves_in_bounded_time(copied: Any, undisturbed: Any, rank: int, saving: str) -> None:
    """Without a launcher that ends them. The time limit of collectives is 15 s."""
    endings = disturbed(job := copied("dp2", saving), Fault(rank, SAVED, 0), "parallel.timeout_seconds=15", grace=120)
    other = endings[1 - rank]
    assert endings[rank].code == KILLED and other.code == 1 and other.seconds < 140, logs(endings)
    said = "rank 1 of the run gave no sign of life" if rank == 1 else STORE_LOST
    assert said in other.log, logs(endings)
    assert_goes_on(job, undisturbed("dp2"))


def _killed_at_random(make: Make, folder: Path, layout: str, saving: str, seed: int, kills: int) -> None:
    """Kill random ranks at random moments of starts and steps, then finish and compare with a run that was left alone."""
    generator = random.Random(seed)
    begin = time.monotonic()
    make(folder / "measured", layout, saving).finish("training.steps=1")
    span = 1.5 * (time.monotonic() - begin)  # in which the moment lies; it follows the speed of the machine
    job = make(folder / "run", layout, saving)
    seen: dict[int, dict[str, Any]] = {}
    killed = without_step = 0
    for _ in range(8 * kills):
        steps, rank = _lines(job), generator.randrange(job.world)
        early = killed % 3 == 0  # every third in the start or the loading
        moment, grace = generator.uniform(0, span / 3) if early else generator.uniform(0, span), generator.uniform(0, 0.2)
        begin = time.monotonic()
        endings = job.start(f"training.steps={max(seen, default=0) + 8}", kill_after={rank: moment}, grace=grace)
        took = time.monotonic() - begin
        for step in whole_steps(job.checkpoints):
            found = contents(job.checkpoints, step)
            assert differences(found, seen.setdefault(step, found)) == [], step
        if endings[rank].code == 0:  # the moment was too late, for the machine is faster than it was
            span = 0.9 * min(span, took)
            continue
        assert endings[rank].code == KILLED and not endings[rank].put_down, logs(endings)
        killed += 1
        without_step += _lines(job) <= steps
        span *= 1.1 if _lines(job) <= steps else 0.95
        if killed == kills:
            break
    assert killed == kills and without_step, "some must hit the start and the loading"
    assert without_step < kills or kills < 10, "and some the steps and the saves"
    last = max(seen, default=0) + 2
    job.finish(f"training.steps={last}")
    expected = make(folder / "undisturbed", layout, saving, keep_last=1000)
    expected.finish(f"training.steps={last}")
    for step, found in seen.items():
        assert differences(found, contents(expected.checkpoints, step)) == [], step
    assert_same_end(job, expected, last)


def _lines(job: Job) -> int:
    """Lines of the metrics, of which the last may be cut off."""
    metrics = job.run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_killed_at_a_few_random_moments(make: Make, tmp_path: Path) -> None:
    _killed_at_random(make, tmp_path, "dp2", "in the background", seed=1, kills=6)


@pytest.mark.parametrize(
    ("layout", "saving", "seed"),
    [
        pytest.param("dp2", "in the background", 2, marks=pytest.mark.exhaustive),
        pytest.param("dp2", "at once", 3, marks=pytest.mark.slow),
        pytest.param("pp2", "in the background", 4, marks=pytest.mark.slow),
    ],
)
def test_killed_at_many_random_moments(make: Make, tmp_path: Path, layout: str, saving: str, seed: int) -> None:
    _killed_at_random(make, tmp_path, layout, saving, seed, kills=20)
