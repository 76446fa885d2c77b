"""Training as a job: two nodes under torchrun, warned before the limit and back in the queue; plain srun; what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from tests.launch import launch
from tests.runs import TINY
from tests.slurm.cluster import SCRIPTS, Cluster
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.test_runs import state_of

TWO_NODES = ("--nodes=2", "--gpus-per-node=0")


def _config(folder: Path, run: str, steps: int, **sections: dict[str, Any]) -> Path:
    raw = TINY | {"lr_schedule": {"kind": "constant"}, "logging": {"run_dir": str(folder / run)}, **sections}
    return write_config(folder / f"{run}.yaml", raw | {"training": TINY["training"] | {"steps": steps}})


def _losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run) if "loss" in line]


def _outcome(run: Path) -> str | None:
    return read_status(run)["outcome"] if (run / "status.json").exists() else None


def _steps(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def _same_run(one: Path, other: Path, steps: int) -> None:
    """Every loss and, at the end, every tensor of the checkpoint, to the bit."""
    assert _losses(one) == _losses(other)
    states = [state_of(open_checkpoint(run / f"checkpoints/step-{steps:08d}")) for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_that_its_time_limit_stops_goes_on_as_if_nothing_had_been(tmp_path: Path, cluster: Cluster) -> None:
    """SLURM's own warning: it looks every 30 seconds whom to warn, so that it comes within the first minute, long before the
    limit. A job that waits for the run is not released before its end.
    """
    config, run = _config(tmp_path, "run", 1_000_000), tmp_path / "run"
    limit = ("--time=5", "--signal=B:USR1@245")
    job = cluster.submit(*TWO_NODES, *limit, SCRIPTS / "train.sbatch", config.name, cwd=tmp_path)
    after = cluster.submit(
        f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap", "cp run/status.json seen.json", cwd=tmp_path
    )
    log = tmp_path / f"train-{job}.log"
    cluster.until(lambda: _outcome(run) == "stopped", 400, "the limit did not stop the run")
    steps = read_status(run)["step"] + 5
    _config(tmp_path, "run", steps)
    cluster.until(lambda: cluster.jobs(job)[0]["Restarts"] == "1", 400, "the job did not go back into the queue")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.wait(job) == ["COMPLETED"], log.read_text()
    assert cluster.jobs(job)[0]["Restarts"] == "1"
    text = log.read_text()
    assert "2 ranks: tp 1" in text and f"step {steps - 5} is saved; job {job} is back in the queue" in text, text
    assert text.count("continuing from") == 1 and read_status(run) == {"outcome": "done", "step": steps}
    assert cluster.wait(after) == ["COMPLETED"] and json.loads((tmp_path / "seen.json").read_text())["outcome"] == "done"

    # As many steps as the job took in a minute, beside whatever else this machine has to do.
    endings = launch(2, main, ["train", str(_config(tmp_path, "whole", steps))], timeout=900)
    assert [ending.code for ending in endings] == [0, 0], endings[0].log
    _same_run(run, tmp_path / "whole", steps)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_plain_srun(tmp_path: Path, cluster: Cluster) -> None:
    """A process in the shell of sbatch is alone. The tasks of srun are ranks: the run they make, warned and gone on with, is
    that of a launcher's ranks.
    """
    run = tmp_path / _config(tmp_path, "run", 1_000_000).stem
    train = "$PYTHON -m megatron_llm train run.yaml"
    twice = f"srun {train}; echo code $?; until [ -e go ]; do sleep 0.2; done; srun {train}"
    shell = f"{train} logging.run_dir=$PWD/shell training.steps=2 && {{ {twice}; }}"
    job = cluster.submit("--nodes=2", "--ntasks=2", "--output=log", "--wrap", shell, cwd=tmp_path)
    log = tmp_path / "log"
    cluster.until(lambda: _steps(run) > 5, 400, "srun's ranks took no steps")
    cluster.call("scancel", "--signal=USR1", str(job))
    cluster.until(lambda: "code 75" in log.read_text(), 400, "the ranks did not stop")
    steps = read_status(run)["step"] + 3
    _config(tmp_path, "run", steps)
    (tmp_path / "go").touch()
    assert cluster.wait(job) == ["COMPLETED"], log.read_text()
    text = log.read_text()
    assert "1 ranks: tp 1" in text and text.count("2 ranks: tp 1") == 2 and "continuing from" in text, text

    # As many steps as the job took in a minute, beside whatever else this machine has to do.
    endings = launch(2, main, ["train", str(_config(tmp_path, "whole", steps))], timeout=900)
    assert [ending.code for ending in endings] == [0, 0], endings[0].log
    _same_run(run, tmp_path / "whole", steps)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_that_fails_or_is_cancelled_is_not_put_back(tmp_path: Path, cluster: Cluster) -> None:
    """Neither is one whose job must not be; and each says what to do."""
    for name in ("failing", "cancelled", "once"):
        _config(tmp_path, name, 1_000_000, training={})
    submit = ("--nodes=1", "--gpus-per-node=0", "--exclusive=user")
    script, runs, skips = SCRIPTS / "train.sbatch", ("failing", "cancelled", "once"), "training.max_skipped_steps=3"
    jobs = {
        "failing": cluster.submit(*submit, script, "failing.yaml", "optimizer.lr=1.0e+300", skips, cwd=tmp_path),
        "cancelled": cluster.submit(*submit, script, "cancelled.yaml", cwd=tmp_path),
        "once": cluster.submit(*submit, "--no-requeue", script, "once.yaml", cwd=tmp_path),
    }
    logs = {name: tmp_path / f"train-{jobs[name]}.log" for name in runs}
    for name in runs[1:]:
        cluster.until(lambda name=name: _steps(tmp_path / name) > 1, 400, f"{name} did not begin")
    cluster.call("scancel", str(jobs["cancelled"]))
    cluster.call("scancel", "--signal=USR1", "--batch", str(jobs["once"]))
    assert cluster.wait(jobs["failing"]) == ["FAILED"]
    said = logs["failing"].read_text()
    assert re.search("the run failed: .*(.|\n)*Mend what the reason says and submit the same command again", said), said
    assert cluster.wait(jobs["cancelled"]) == ["CANCELLED"]
    cluster.until(lambda: "The same command goes on from there" in logs["cancelled"].read_text(), 200, "no word of the job")
    assert cluster.wait(jobs["once"]) == ["FAILED"] and cluster.jobs(jobs["once"])[0]["ExitCode"] == "75:0"
    assert "Jobs must be submitted with --requeue" in logs["once"].read_text()
    assert [cluster.jobs(job)[0]["Restarts"] for job in jobs.values()] == ["0"] * 3
    assert [read_status(tmp_path / name)["outcome"] for name in runs] == ["failed", "stopped", "stopped"]
