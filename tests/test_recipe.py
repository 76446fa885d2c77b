"""examples/continue_then_sft: from an open base model without a chat template to one that chats, on 2 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_llm.config import parse_config
from tests.runs import TINY
from tests.test_readme import FROM_FILES, ROOT, commands_of, copy_tree, prepare

RECIPE = ROOT / "examples" / "continue_then_sft"
SMALL = {
    "training": {"sequence_length": 64, "global_batch_size": 4, "steps": 4, "eval_every": 2},
    "checkpoint": {"every_steps": 2}, "lr_schedule": {"warmup_steps": 1},
}  # fmt: skip


def make_base(folder: Path) -> None:
    """A tiny Llama with a tokenizer that has no chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")


def small_checkout(folder: Path) -> None:
    """The examples, with a recipe of a few steps; and what the README says that one needs."""
    prepare(folder)
    make_base(folder)
    copy_tree(ROOT / "examples", folder / "examples")
    for name in ("continue.yaml", "sft.yaml"):
        path = folder / "examples" / "continue_then_sft" / name
        raw = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(raw | {section: raw[section] | settings for section, settings in SMALL.items()}))


def run_as_written(folder: Path, starts: tuple[str, ...], environment: dict[str, str]) -> None:
    """The README's commands from files to a model that start so, in a small checkout."""
    mine = [command for command in commands_of("README.md", FROM_FILES) if command.startswith(starts)]
    assert len(mine) == len(starts)
    for command in mine:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, input="", capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"


def environment() -> dict[str, str]:
    """Of a user whose virtual environment is active."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NPROC_PER_NODE": "2",
        "PYTHON": sys.executable,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
    }


def _run(folder: Path, out: str, *more: str) -> str:
    """What the script prints, when it ends well."""
    files = {"hf": "base", "text": "text.jsonl", "text-valid": "text.jsonl", "chat": "chat.jsonl", "chat-valid": "chat.jsonl"}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    settings = [f"{section}.{key}={value}" for section, values in SMALL.items() for key, value in values.items()]
    command = [str(RECIPE / "run.sh"), *options, "--out", out, *more, *settings]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_from_a_base_model_to_one_that_chats(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small_checkout(tmp_path)
    run_as_written(tmp_path, ("examples/continue_then_sft/", "megatron-llm report", "megatron-llm chat"), environment())
    assert (tmp_path / "out" / "report.html").is_file()
    for phase in ("continued", "tuned"):
        assert json.loads((tmp_path / "out" / phase / "status.json").read_text())["outcome"] == "done"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    assert "<|im_start|>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert model.config.vocab_size == len(tokenizer) > 400  # the template's tokens have found room
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    lines = (tmp_path / "out" / "tuned" / "metrics.jsonl").read_text().splitlines()
    assert len((tmp_path / "out" / "tuned" / "samples.jsonl").read_text().splitlines()) > 0
    run_as_written(tmp_path, ("examples/continue_then_sft/",), environment())
    assert (tmp_path / "out" / "tuned" / "metrics.jsonl").read_text().splitlines() == lines, "what is done is not done again"


@pytest.mark.slow
def test_adapters_learn_the_tokens_of_a_new_template(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare(tmp_path)
    make_base(tmp_path)
    _run(tmp_path, "out", "--template", "chatml", "--lora", "sft:data.overlong=drop", "continue:optimizer.lr=1.0e-5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert not weight[start].equal(weight[end]), "they began alike"


def test_the_recipes_are_valid_and_name_every_choice() -> None:
    for name in ("continue.yaml", "sft.yaml"):
        raw = yaml.safe_load((RECIPE / name).read_text())
        parse_config(raw | {"model": TINY["model"]})
    assert {"packing", "order", "overlong", "train_on", "prompt_loss_weight", "conversation_augment"} <= raw["data"].keys()
    chosen = raw["training"]["regularization"].keys()
    assert {"hidden_dropout", "neftune_noise_alpha", "label_smoothing", "z_loss"} == chosen
    assert {"ema_decay", "rules"} <= raw["optimizer"].keys() and "recompute" in raw["training"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--hf is missing"),
        (["--hf", "nowhere"], "--hf: nowhere does not exist"),
        (["--chat"], "--chat needs a value"),
        (["--what"], "unknown: --what"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    done = subprocess.run([str(RECIPE / "run.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "run.sh --hf DIR" in done.stderr
