"""Deduplication in several processes and as SLURM jobs."""

from __future__ import annotations

import os
import re
import signal
import stat
from pathlib import Path

import pytest
from datatrove.pipeline.base import PipelineStep

from megatron_llm.data.prepare import dedup
from megatron_llm.data.prepare.dedup import DedupOptions, Slurm, Stage, deduplicate
from tests.data.prepare.dedup_files import corpus_texts, kept_texts, write_jsonl


class Killed(PipelineStep):
    """A worker that the kernel takes away."""

    type, name = "TEST", "killed"

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("poll_seconds", [0.2, 4.0])
def test_processes_give_the_same_and_a_killed_one_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poll_seconds: float
) -> None:
    """Also if a worker comes and goes between two looks at the workers."""
    monkeypatch.setattr(dedup, "POLL_SECONDS", poll_seconds)
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", ["same", f"other {number}"]) for number in range(3)]
    deduplicate(inputs, tmp_path / "out", DedupOptions(near=False), workers=2, progress=False)
    assert kept_texts(tmp_path / "out") == ["same", "other 0", "other 1", "other 2"]
    with pytest.raises(RuntimeError, match="a worker of stage fatal was killed"):
        dedup._run_here([Stage("fatal", 4, [Killed()])], tmp_path / "fatal", workers=2, progress=False)


SBATCH = """#!/bin/bash
# Stands in for sbatch: keeps the script and the options, and gives a job id.
number=$(ls {folder} | grep -c script)
cp "${{@: -1}}" {folder}/script-$number
echo "$@" > {folder}/options-$number
echo Submitted batch job $((100 + number))
"""
RUNNING = """#!/bin/bash
# Runs the job as SLURM would, at once, one array element after the other.
{sbatch}
last=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' {folder}/script-$number)
for index in $(seq 0 $last); do
    export RUN_OFFSET=0 SLURM_NODELIST=here SLURM_ARRAY_TASK_ID=$index
    bash {folder}/script-$number > {folder}/log-$number-$index 2>&1
done
"""


def _command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_jobs_wait_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    _command(programs, "sbatch", SBATCH.format(folder=jobs))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", ["x"]) for number in range(5)]
    slurm = Slurm("long", "10:00:00", 7, {"account": "physics"})
    call = (inputs, tmp_path / "out", DedupOptions(buckets=3, hashes_per_bucket=4))
    assert deduplicate(*call, slurm=slurm, workers=2, progress=False) is None
    scripts = [(jobs / f"script-{number}").read_text() for number in range(len(list(jobs.glob("script-*"))))]
    stages = [text for text in scripts if "launch_pickled_pipeline" in text]
    names = [re.search(r"--job-name=dedup-(\S+)", text)[1] for text in stages]  # type: ignore[index]
    assert names == ["exact-hash", "exact-find", "near-sign", "near-match", "near-cluster", "decide", "write", "report"]
    arrays = [re.search(r"--array=0-(\d+)", text)[1] for text in stages]  # type: ignore[index]
    assert arrays == ["4", "4", "4", "2", "0", "0", "4", "0"]
    for line in ("--partition=long", "--time=10:00:00", "--mem-per-cpu=7G", "--account=physics"):
        assert all(f"#SBATCH {line}\n" in text for text in stages)
    options = [(jobs / f"options-{scripts.index(text)}").read_text() for text in stages]
    ids = [100 + scripts.index(text) for text in stages]
    assert "dependency" not in options[0]
    for before, text in zip(ids, options[1:], strict=False):
        assert f"--dependency=afterok:{before}" in text
    _command(programs, "squeue", f"#!/bin/bash\n[[ $2 == --jobs={ids[3]} ]] && echo running; exit 0\n")
    with pytest.raises(ValueError, match=f"job {ids[3]} of this run is still queued or running"):
        deduplicate(*call, slurm=slurm, workers=2, progress=False)


def test_slurm_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="sbatch"):
        deduplicate(
            [write_jsonl(tmp_path / "a.jsonl", ["x"])], tmp_path / "out", DedupOptions(), slurm=Slurm("p", "1:00"), progress=False
        )


@pytest.mark.slow
def test_slurm_jobs_do_what_a_local_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    _command(programs, "sbatch", RUNNING.format(sbatch=SBATCH.format(folder=jobs), folder=jobs))
    _command(programs, "srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; exec "$@"\n')
    _command(programs, "scontrol", "#!/bin/bash\necho here\n")
    _command(programs, "squeue", "#!/bin/bash\nexit 1\n")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    corpus = corpus_texts()
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", corpus[number::2]) for number in range(2)]
    options = DedupOptions(buckets=4, hashes_per_bucket=5)
    slurm = Slurm("long", "10:00:00")
    assert deduplicate(inputs, tmp_path / "out", options, slurm=slurm, progress=False) is None
    report = deduplicate(inputs, tmp_path / "out", options, slurm=slurm, progress=False)
    assert report is not None
    here = deduplicate(inputs, tmp_path / "here", options, workers=1, progress=False)
    assert here is not None and here["documents"] == report["documents"] and report["documents"]["removed_near"] > 10
    assert kept_texts(tmp_path / "here") == kept_texts(tmp_path / "out")
