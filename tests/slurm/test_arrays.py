"""Arrays of jobs: text in shards of which one is killed, a sweep, conversions from a list; and what wrong input is told."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from megatron_llm.cli.main import main
from megatron_llm.config import parse_config
from tests.runs import TINY
from tests.slurm.cluster import SCRIPTS, Cluster
from tests.test_readme import copy_tree, prepare
from tests.training.commands import read_metrics, read_status, write_config

SMALL = ("--cpus-per-task=1",)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_shard_that_was_killed_is_repeated_alone_and_the_text_is_whole(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    what = ("--input", "text.jsonl", "--tokenizer", "tokenizer", "--split", "0.8,0.2", "--shuffle-documents=5", "--output")
    script = SCRIPTS / "preprocess_array.sbatch"
    slow = tmp_path / "slow_python"  # of which task 1 runs until it is killed
    slow.write_text(f'#!/bin/bash\nif [[ ${{SLURM_ARRAY_TASK_ID:-}} == 1 ]]; then sleep 1000; fi\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    variables = {"MERGE_OPTIONS": "--time=5", "PYTHON": str(slow)}
    job = cluster.submit("--array=0-2", *SMALL, script, *what, "data/text", cwd=tmp_path, **variables)
    cluster.until(lambda: cluster.states(job)[1:2] == ["RUNNING"], 200, "task 1 did not begin")
    cluster.call("scancel", "--signal=KILL", "--full", f"{job}_1")
    states = cluster.wait(job)
    log = (tmp_path / f"preprocess-{job}_0.log").read_text()
    assert [state == "COMPLETED" for state in states] == [True, False, True], log
    merges = [int(number) for number in re.findall(r"^job (\d+) merges the shards", log, re.MULTILINE)]
    assert len(merges) == 2, log
    assert [cluster.wait(merge) for merge in merges] == [["CANCELLED"]] * 2
    assert not list((tmp_path / "data").glob("text-*-00001-of-00003.idx"))

    again = cluster.submit("--array=1", *SMALL, script, *what, "data/text", cwd=tmp_path, SHARDS="3")
    assert cluster.wait(again) == ["COMPLETED"]
    log = (tmp_path / f"preprocess-{again}_1.log").read_text()
    merges = [int(number) for number in re.findall(r"^job (\d+) merges the shards", log, re.MULTILINE)]
    assert [cluster.wait(merge) for merge in merges] == [["COMPLETED"]] * 2

    assert main(["preprocess", *what, "whole/text"]) == 0
    for name in ("text-train.bin", "text-train.idx", "text-valid.bin", "text-valid.idx"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sweep_and_conversions(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "sweep.yaml", TINY | {"logging": {"run_dir": "sweep"}})
    (tmp_path / "table.txt").write_text("# name, overrides\nlow optimizer.lr=0.001\n\nhigh optimizer.lr=0.01 'training.seed=8'\n")
    (tmp_path / "list.txt").write_text('export sweep/low "hf/of low" --dtype fp32\nexport sweep/high hf/high\n')
    sweep = (SCRIPTS / "sweep_array.sbatch", config.name, "table.txt", "training.steps=3")
    runs = cluster.submit("--array=0-1", "--gpus-per-node=0", *sweep, cwd=tmp_path)
    convert = (SCRIPTS / "convert_array.sbatch", "list.txt")
    exports = cluster.submit("--array=0-1", f"--dependency=afterok:{runs}", *SMALL, *convert, cwd=tmp_path)
    assert cluster.wait(runs) == ["COMPLETED"] * 2, (tmp_path / f"sweep-{runs}_0.log").read_text()
    assert cluster.wait(exports) == ["COMPLETED"] * 2, (tmp_path / f"convert-{exports}_0.log").read_text()
    for name, overrides, folder in (("low", ["optimizer.lr=0.001"], "of low"), ("high", ["training.seed=8"], "high")):
        mine = f"logging.run_dir=alone/{name}"
        assert main(["train", config.name, "training.steps=3", *overrides, mine]) == 0
        lines = [read_metrics(tmp_path / where / name) for where in ("sweep", "alone")]
        assert [line["loss"] for line in lines[0][1:]] == [line["loss"] for line in lines[1][1:]] and len(lines[0]) == 4
        assert read_status(tmp_path / "sweep" / name)["outcome"] == "done"
        assert main(["export", f"alone/{name}", f"expected/{name}", *(["--dtype", "fp32"] if name == "low" else [])]) == 0
        files = [tmp_path / "hf" / folder, tmp_path / "expected" / name]
        assert files[0].joinpath("model.safetensors").read_bytes() == files[1].joinpath("model.safetensors").read_bytes()


def test_the_table_that_is_shipped_is_valid_and_begins_small() -> None:
    sizes = []
    base = yaml.safe_load((SCRIPTS / "sweep.yaml").read_text())
    lines = [line.split() for line in (SCRIPTS / "sweep.txt").read_text().splitlines() if line.strip() and line[0] != "#"]
    assert len({line[0] for line in lines}) == len(lines)
    for name, *overrides in lines:
        raw = json.loads(json.dumps(base))
        for key, value in (override.split("=", 1) for override in overrides):
            section, _, field = key.partition(".")
            raw.setdefault(section, {})[field] = yaml.safe_load(value)
        model = parse_config(raw).model
        from megatron_llm.models.names import logical_tensors

        size = sum(_elements(shape) for _, shape in logical_tensors(model))
        assert abs(size / 1e6 / float(name.split("-")[0].rstrip("m")) - 1) < 0.15, (name, size)
        sizes.append(size)
    assert sizes == sorted(sizes) and 1.1e8 < sizes[0] < 1.5e8


def _elements(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_what_is_wrong_is_said_with_the_way_out(tmp_path: Path, cluster: Cluster) -> None:
    config = write_config(tmp_path / "run.yaml", TINY | {"logging": {"run_dir": "run"}}).name
    write_config(tmp_path / "wrong.yaml", TINY | {"optimizer": {"lr": "fast"}, "logging": {"run_dir": "run"}})
    (tmp_path / "table.txt").write_text("one optimizer.lr=0.001\n")
    (tmp_path / "wrong.txt").write_text("optimizer.lr=0.001\n")
    (tmp_path / "failing.txt").write_text("export nowhere hf\n")
    (tmp_path / "other.txt").write_text("rm -rf hf\n")
    array, gpus = ("--array=5",), ("--gpus-per-node=0",)
    cases = [
        ("train", gpus, ["missing.yaml"], "missing.yaml is not a file in"),
        ("train", gpus, [], "usage: sbatch"),
        ("train", gpus, ["wrong.yaml"], "optimizer.lr(.|\n)*nothing was started; mend them and submit again"),
        ("sweep_array", gpus, [config, "table.txt"], "no task of an array: submit with --array=0-0"),
        ("sweep_array", (*gpus, *array), [config, "table.txt"], "task 5 of the array is outside .* which has 1 runs: .*0-0"),
        ("sweep_array", (*gpus, "--array=0"), [config, "wrong.txt"], "the first word of a line is the name of the run"),
        ("sweep_array", (*gpus, "--array=0"), [config, "nowhere.txt"], "nowhere.txt is not a file"),
        ("convert_array", ("--array=0",), ["failing.txt"], "nowhere(.|\n)*then repeat it alone: sbatch --array=0"),
        ("convert_array", ("--array=0",), ["other.txt"], "begins with 'rm'; a line is: import"),
        ("preprocess_array", (), ["--input", "text.jsonl"], "no task of an array: submit with --array=0-15"),
        ("preprocess_array", array, ["--input", "text.jsonl"], "how many there are: SHARDS=16 sbatch --array=3,7"),
        ("preprocess_array", ("--array=0",), ["--input", "text.jsonl"], "--output is missing"),
        ("preprocess_array", ("--array=0",), ["--shard", "0/2"], "--shard is this script's"),
        ("command", (), ["inspect", "nowhere"], "nowhere(.|\n)*submit the same command again"),
    ]
    logs = tmp_path / "logs"
    logs.mkdir()
    # From elsewhere, so that the scripts must find what belongs to them.
    elsewhere = tmp_path / "copies with a space" / "examples"
    copy_tree(SCRIPTS.parent, elsewhere)
    jobs = []
    for number, (name, options, arguments, _) in enumerate(cases):
        few = () if name in ("train", "sweep_array", "command") else SMALL
        place = SCRIPTS if number % 2 else elsewhere / "slurm"
        output = f"--output={logs}/{number}.log"
        jobs.append(cluster.submit("--nodes=1", *few, *options, output, place / f"{name}.sbatch", *arguments, cwd=tmp_path))
    for number, (job, (name, _, arguments, said)) in enumerate(zip(jobs, cases, strict=True)):
        assert cluster.wait(job) == ["FAILED"]
        text = (logs / f"{number}.log").read_text()
        assert re.search(said, text), f"{name} {arguments}: {text}"
    assert cluster.jobs(jobs[0])[0]["Restarts"] == "0" and not (tmp_path / "run").exists()
