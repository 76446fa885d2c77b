"""pipeline.sh as the README has it: from files and a folder to a tuned, exported and evaluated model, by one command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.hf.test_harness import write_task
from tests.slurm.cluster import SCRIPTS, Cluster
from tests.test_readme import FROM_FILES, commands_of
from tests.test_recipe import environment, run_as_written, small_checkout
from tests.training.commands import read_status

NAMES = ["chat", "import", "chat-valid", "text", "merge", "text-valid", "continue", "sft", "export", "evaluate"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_from_files_to_an_evaluated_model(tmp_path: Path, cluster: Cluster) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small_checkout(tmp_path)
    write_task(tmp_path, [number % 4 for number in range(40)])
    task = (tmp_path / "tasks/tiny_sums.yaml").read_text()
    (tmp_path / "tasks/mine.yaml").write_text(task.replace("tiny_sums", "mine"))
    (command,) = [line for line in commands_of("README.md", FROM_FILES) if line.startswith("examples/slurm/")]
    few = {"NPROC_PER_NODE": "1", "SBATCH_TIMELIMIT": "10"}  # ranks a node, of eight that the GPUs stand for; minutes
    # Nothing stays in the queue of a pipeline that could not be submitted whole.
    done = cluster.attempt("bash", "-c", f"{command} --evaluate-options --partition=none", cwd=tmp_path, **few)
    assert done.returncode == 1 and "sbatch refused job 'evaluate'" in done.stderr and "cancelled" in done.stderr, done.stderr
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 200, "jobs were not cancelled")

    done = cluster.attempt("bash", "-c", command, cwd=tmp_path, **few)
    assert done.returncode == 0, done.stderr
    jobs = [line.split() for line in (tmp_path / "out/jobs.txt").read_text().splitlines()]
    assert [name for _, name, *_ in jobs] == NAMES
    again = cluster.attempt("bash", "-c", command, cwd=tmp_path, **few)
    assert again.returncode == 1 and f"first: scancel {jobs[0][0]} " in again.stderr, again.stderr
    for job, name, *_ in jobs:
        states = cluster.wait(int(job))
        logs = "\n".join(path.read_text() for path in (tmp_path / "out/logs").glob(f"{name}-{job}*.log"))
        assert set(states) == {"COMPLETED"}, f"{name}: {states}\n{logs}"
    for phase in ("continued", "tuned"):
        assert read_status(tmp_path / "out" / phase) == {"outcome": "done", "step": 4}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert "<|im_start|>" in tokenizer.chat_template and model.config.vocab_size == len(tokenizer) > 400
    (result,) = json.loads((tmp_path / "out/evaluation.json").read_text())["tasks"]
    assert result["task"] == "mine" and 0 <= result["value"] <= 1
    run_as_written(tmp_path, ("megatron-llm report", "megatron-llm chat"), environment())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--hf is missing"),
        (["--hf", "nowhere"], "--hf: nowhere does not exist"),
        (["--chat"], "--chat needs a value"),
        (["--what"], "unknown: --what"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run([str(SCRIPTS / "pipeline.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "pipeline.sh --hf DIR" in done.stderr
