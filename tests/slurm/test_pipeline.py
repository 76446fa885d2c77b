"""pipeline.sh: from files and a folder to a tuned, exported and evaluated model, as one command and a queue."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.hf.test_harness import write_task
from tests.slurm.cluster import SCRIPTS, Cluster
from tests.test_readme import prepare
from tests.test_recipe import make_base
from tests.training.commands import read_status

FILES = {"hf": "base", "text": "text.jsonl", "text-valid": "text.jsonl", "chat": "chat.jsonl", "chat-valid": "chat.jsonl"}
NAMES = ["chat", "import", "chat-valid", "text", "merge", "text-valid", "continue", "sft", "export", "evaluate"]
SMALL = [
    "training.sequence_length=64", "training.global_batch_size=4", "continue:training.steps=4", "sft:training.steps=2",
    "training.eval_every=2", "checkpoint.every_steps=2", "lr_schedule.warmup_steps=1", "sft:logging.sample_every=0",
]  # fmt: skip
FEW = "--cpus-per-task=1 --time=10"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_files_to_an_evaluated_model(tmp_path: Path, cluster: Cluster) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare(tmp_path)
    make_base(tmp_path)
    write_task(tmp_path, [number % 4 for number in range(40)])
    options = [word for name, file in FILES.items() for word in (f"--{name}", file)]
    options += ["--template", "chatml", "--shards", "2", "--out", "out", "--cpu-options", FEW]
    options += ["--train-options", "--nodes=2 --gpus-per-node=0 --time=10", "--evaluate-options", f"--gpus-per-node=0 {FEW}"]
    options += ["--evaluate", f"--tasks tiny_sums --include-path {tmp_path}/tasks --device cpu --limit 8", *SMALL]
    script = str(SCRIPTS / "pipeline.sh")
    # Nothing stays in the queue of a pipeline that could not be submitted whole.
    done = cluster.attempt(script, *options, "--evaluate-options", "--partition=none", cwd=tmp_path)
    assert done.returncode == 1 and "sbatch refused job 'evaluate'" in done.stderr and "cancelled" in done.stderr, done.stderr
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 60, "jobs were not cancelled")

    done = cluster.attempt(script, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = [line.split() for line in (tmp_path / "out/jobs.txt").read_text().splitlines()]
    assert [name for _, name, *_ in jobs] == NAMES
    again = cluster.attempt(script, *options, cwd=tmp_path)
    assert again.returncode == 1 and f"first: scancel {jobs[0][0]} " in again.stderr, again.stderr
    for job, name, *_ in jobs:
        states = cluster.wait(int(job))
        logs = "\n".join(path.read_text() for path in (tmp_path / "out/logs").glob(f"{name}-{job}*.log"))
        assert set(states) == {"COMPLETED"}, f"{name}: {states}\n{logs}"
    for phase, steps in (("continued", 4), ("tuned", 2)):
        assert read_status(tmp_path / "out" / phase) == {"outcome": "done", "step": steps}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert "<|im_start|>" in tokenizer.chat_template and model.config.vocab_size == len(tokenizer) > 400
    (task,) = json.loads((tmp_path / "out/evaluation.json").read_text())["tasks"]
    assert task["task"] == "tiny_sums" and 0 <= task["value"] <= 1


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
