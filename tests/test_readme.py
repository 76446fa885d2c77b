"""The README's commands, run as written, in a folder that holds what the README says it holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TESTED_ELSEWHERE = ("make ", "pip install")  # the Makefile's targets are what runs this test, or have tests of their own


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prepare(folder: Path) -> None:
    """Tiny text, chat, tokenizer and the README's config with a small model instead of its placeholders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_llm").rglob("*.py"))]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sources))
    chat = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(sources, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder / "tokenizer")

    (shown,) = blocks("yaml")
    config = yaml.safe_load(shown)
    config["model"] = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config["data"] |= {"tokenizer": "tokenizer", "valid": config["data"]["train"]}
    config["training"] |= {"sequence_length": 32, "global_batch_size": 8, "steps": 12, "eval_every": 5}
    config["lr_schedule"]["warmup_steps"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    prepare(tmp_path)
    commands = [line.split("  #")[0].strip() for block in blocks("") for line in block.splitlines() if line.strip()]
    mine = [command for command in commands if not command.startswith(TESTED_ELSEWHERE)]
    assert len(mine) >= 10 and all(command.startswith(("megatron-llm ", "torchrun ")) for command in mine)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in mine:
        # The three runs share a folder: each continues the one before it in another layout.
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    assert json.loads((tmp_path / "runs/demo/status.json").read_text()) == {"outcome": "done", "step": 12}
    assert (tmp_path / "hf/demo/tokenizer.json").is_file()


def test_the_readmes_configuration_is_valid() -> None:
    """All keys exist, with an architecture in place of the placeholder folder."""
    from megatron_llm.config import parse_config
    from tests.runs import TINY

    (shown,) = blocks("yaml")
    parse_config(yaml.safe_load(shown) | {"model": TINY["model"]})
