"""`megatron-llm evaluate` on a task of our own, against log-likelihoods computed with transformers by brute force."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_llm.cli import evaluate
from megatron_llm.cli.main import main
from megatron_llm.hf import harness
from megatron_llm.hf.harness import Result, TaskSpec, check_known, evaluate_folder, open_tasks, parse_tasks, summary, table
from tests.families.cases import LLAMA, Case, make_folder
from tests.test_readme import prepare

QUESTIONS = [f"{a} + {b} =" for a in range(5) for b in range(8)]
CHOICES = ["one", "two apples", "def main", "x"]


def test_tasks_with_and_without_shots() -> None:
    assert parse_tasks("arc_challenge:25, hellaswag,x:0") == (
        TaskSpec("arc_challenge", 25), TaskSpec("hellaswag"), TaskSpec("x", 0)
    )  # fmt: skip
    for text in ("a:", "a:x", "", "a,,b", "a:-1", ":3"):
        with pytest.raises(ValueError, match="is no task such as"):
            parse_tasks(text)


def test_the_table_is_the_leaderboards() -> None:
    """Its average is that of acc_norm, acc_norm, acc and the mc2 score, as published."""
    assert tuple(harness.PRESETS) == evaluate.PRESETS
    values = (0.6, 0.8, 0.5, 0.45)
    results = [
        Result(task.name, task.shots or 0, task.metric or "", value, 0.01, {})
        for task, value in zip(harness.PRESETS["open-llm-leaderboard"], values, strict=True)
    ]
    lines = [line.split() for line in table(results, average=True).splitlines()]
    assert lines[1] == ["arc_challenge", "25", "acc_norm", "60.00", "1.00"]
    assert [line[:3] for line in lines[2:5]] == [
        ["hellaswag", "10", "acc_norm"],
        ["mmlu", "5", "acc"],
        ["truthfulqa_mc2", "0", "acc"],
    ]
    assert lines[5] == ["average", "58.75"]


def test_a_file_of_scores_is_json_whatever_they_are() -> None:
    result = Result("x", 0, "word_perplexity", float("inf"), float("nan"), {"word_perplexity": float("inf"), "acc": 0.5})
    (line,) = json.loads(json.dumps(summary([result], True, model="m"), allow_nan=False))["tasks"]
    assert line["value"] is line["stderr"] is None and line["all"] == {"word_perplexity": None, "acc": 0.5}


def test_a_harness_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["evaluate", "--hf", "anywhere"]) == 1
    assert "pip install 'megatron_llm[eval]'" in capsys.readouterr().err


def write_task(path: Path, answers: list[int]) -> None:
    """The task tiny_sums in `path`/tasks, with its questions and what is right."""
    for name, right in (("sums", answers), ("examples", [0, 1])):
        rows = [{"question": text, "choices": CHOICES, "answer": answer} for text, answer in zip(QUESTIONS, right, strict=False)]
        (path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(path / "sums.json"), "train": str(path / "examples.json")}
    (path / "tasks").mkdir()
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "fewshot_split": "train",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(path / "cache")}, "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "choices", "doc_to_target": "answer",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    }  # fmt: skip
    (path / "tasks/tiny_sums.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, and a task with few-shot examples."""
    path = tmp_path_factory.mktemp("harness")
    prepare(path)
    make_folder(Case("LlamaForCausalLM", {**LLAMA, "vocab_size": 400, "max_position_embeddings": 512}), path / "hf")
    for file in (path / "tokenizer").iterdir():
        (path / "hf" / file.name).write_bytes(file.read_bytes())
    # What is right follows what the model prefers, so that acc is 3/4, and acc_norm another number, whatever the tokenizer
    # learned from this machine's text and whatever the weights are.
    likeliest = [pick for pick, _ in _picks(path, 0, len(QUESTIONS))]
    write_task(path, [pick if number % 4 else (pick + 1) % 4 for number, pick in enumerate(likeliest)])
    return path


def _picks(folder: Path, shots: int, count: int) -> list[tuple[int, int]]:
    """Of each question: the choice of the highest log-likelihood, and of the highest one per character."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    examples = "".join(f"Q: {QUESTIONS[number]}\nA: {CHOICES[number]}\n\n" for number in range(shots))
    picks = []
    for question in QUESTIONS[:count]:
        prompt, scores = f"{examples}Q: {question}\nA:", []
        for choice in CHOICES:
            before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {choice}")["input_ids"]
            assert ids[: len(before)] == before
            with torch.no_grad():
                logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids))))
        normed = [score / len(choice) for score, choice in zip(scores, CHOICES, strict=True)]
        picks.append((scores.index(max(scores)), normed.index(max(normed))))
    return picks


def _expected(folder: Path, shots: int, count: int) -> tuple[float, float]:
    """(acc, acc_norm) by brute force."""
    answers = [json.loads(line)["answer"] for line in (folder / "sums.json").read_text().splitlines()[:count]]
    hits = [[pick == answer for pick in picks] for picks, answer in zip(_picks(folder, shots, count), answers, strict=True)]
    return sum(hit[0] for hit in hits) / count, sum(hit[1] for hit in hits) / count


@pytest.mark.slow
def test_scores_are_those_of_brute_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = open_tasks([TaskSpec("tiny_sums")], folder / "tasks")
    for shots, limit in ((0, None), (2, 30)):
        (result,) = evaluate_folder(folder / "hf", [TaskSpec("tiny_sums", shots)], manager, limit=limit, batch_size=4)
        acc, acc_norm = _expected(folder, shots, limit or len(QUESTIONS))
        assert (result.all["acc"], result.all["acc_norm"]) == pytest.approx((acc, acc_norm), abs=1e-12)
        assert (result.metric, result.value, result.shots) == ("acc_norm", result.all["acc_norm"], shots)
        assert result.stderr > 0 and (shots or (acc == 0.75 != acc_norm))
    with pytest.raises(
        ValueError, match="no task 'tiny_sum'; near it are tiny_sums(?s:.*)'arc_chalenge'; near it are .*arc_challenge"
    ):
        check_known([TaskSpec("tiny_sum"), TaskSpec("arc_chalenge", 2), TaskSpec("hellaswag")], manager.all_tasks)
    asked = evaluate_folder(folder / "hf", [TaskSpec("tiny_sums")], manager, chat_template=True)
    assert asked[0].all != _of_command(folder, capsys)["all"]
    (folder / "hf/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        evaluate_folder(folder / "hf", [TaskSpec("tiny_sums")], manager, chat_template=True)


def _of_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command says of a checkpoint with the weights of the folder, which are those of its export."""
    assert main(["import", str(folder / "hf"), str(folder / "run")]) == 0
    capsys.readouterr()
    files = {"--include-path": "tasks", "--output": "out.json", "--export-to": "kept"}
    options = [text for option, name in files.items() for text in (option, str(folder / name))]
    command = ["evaluate", "--checkpoint", str(folder / "run"), "--tasks", "tiny_sums", "--device", "cpu", *options]
    assert main(command) == 0
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    (task,) = found["tasks"]
    acc, acc_norm = _expected(folder, 0, len(QUESTIONS))
    assert (task["all"]["acc"], task["value"]) == pytest.approx((acc, acc_norm), abs=1e-12)
    assert "average" not in found and f"{100 * acc_norm:.2f}" in capsys.readouterr().out
    assert (folder / "kept/model.safetensors").is_file()
    return dict(task)
