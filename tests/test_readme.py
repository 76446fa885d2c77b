"""The commands of the README and of pages in docs, run as written in a folder as the README describes it; lists in pages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TESTED_ELSEWHERE = ("make ", "pip install")  # the Makefile's targets are what runs this test, or have tests of their own
FROM_FILES = "From your files to a tuned model"  # tests/test_recipe.py and tests/slurm/test_pipeline.py run this section


def blocks(language: str, page: str = "README.md", section: str | None = None) -> list[str]:
    """The contents of the fenced blocks of a page, or of one of its sections, that are in a language."""
    found: list[str] = []
    inside: str | None = None
    text = (ROOT / page).read_text(encoding="utf-8")
    if section is not None:
        _, title, rest = text.partition(f"\n## {section}\n")
        assert title, f"{page} has no section {section!r}"
        text = rest.partition("\n## ")[0]
    for line in text.splitlines(keepends=True):
        if not line.startswith("```"):
            if inside == language:
                found[-1] += line
        elif inside is None:
            inside = line.removeprefix("```").strip()
            found += [""] if inside == language else []
        else:
            inside = None
    return found


def commands_of(page: str, section: str | None = None) -> list[str]:
    """Every command of a page, or of one of its sections, as written."""
    text = "".join(blocks("", page, section)).replace("\\\n", " ")
    return [" ".join(line.split("  #")[0].split()) for line in text.splitlines() if line.strip()]


def copy_tree(source: Path, target: Path) -> None:
    """A copy of a folder of the project, without what Python may be writing there."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def run_commands(page: str, folder: Path, at_least: int, section: str | None = None) -> None:
    """Run every command of a page, or of one of its sections, in `folder`, in order; each must succeed."""
    commands = commands_of(page, section)
    mine = [command for command in commands if not command.startswith(TESTED_ELSEWHERE)]
    assert len(mine) >= at_least and all(command.startswith(("megatron-llm ", "torchrun ")) for command in mine)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in mine:
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"


def prepare(folder: Path) -> None:
    """Tiny text, chat, tokenizer and the README's config with a small model instead of its placeholders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_llm").rglob("*.py"))]
    for name, texts in (("text", sources), ("text_valid", sources[:20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chat = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    for name in ("chat", "chat_valid"):
        (folder / f"{name}.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    (folder / "faq.csv").write_text("question,answer,context\nWhat is 1 + 1?,2,\nAnd 1 + 2?,3,Of numbers.\n")
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
    config["lr_schedule"] |= {"warmup_steps": 2, "decay_steps": 12}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    prepare(tmp_path)
    (shown,) = blocks("yaml")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["data"]["valid"] = yaml.safe_load(shown)["data"]["valid"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # The runs share a folder: each continues the one before in another layout.
    run_commands("README.md", tmp_path, at_least=20, section="Step by step")
    assert {*commands_of("README.md")} == {
        "make quickstart", "make venv && . .venv/bin/activate",
        *commands_of("README.md", "Step by step"), *commands_of("README.md", FROM_FILES),
    }, "commands that no test runs"  # fmt: skip
    status = json.loads((tmp_path / "runs/demo/status.json").read_text())
    assert status == {"outcome": "done", "step": 12}
    assert (tmp_path / "hf/demo/tokenizer.json").is_file()
    run_commands("docs/checkpoints.md", tmp_path, at_least=1)
    status = json.loads((tmp_path / "runs/demo/status.json").read_text())
    assert status == {"outcome": "done", "step": 12, "changes": ["optimizer.lr: 2e-05 -> 1e-05"]}


@pytest.mark.slow
def test_every_command_of_the_data_page_runs(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_commands("docs/data.md", tmp_path, at_least=8)
    for prefix in ("data/text", "data/split-train", "data/split-valid", "data/joined"):
        assert (tmp_path / f"{prefix}.idx").is_file()
    assert (tmp_path / "data/joined.bin").read_bytes() == (tmp_path / "data/text.bin").read_bytes()
    assert (tmp_path / "data/text.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "dedup.json").read_text())

    shown, *_ = blocks("yaml", "docs/data.md")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | yaml.safe_load(shown)
    config["training"] |= {"steps": 2, "eval_every": 2}
    config["logging"]["run_dir"] = "runs/data"
    config["parallel"] = {}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_llm", "train", "data.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "runs/data/metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid_loss/held_out"] > 0


@pytest.mark.slow
def test_the_commands_about_evaluation_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "questions.jsonl").write_text('"What is 1 + 1?"\n{"messages": [{"role": "user", "content": "And 1 + 2?"}]}\n')
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    source = [{"path": "data/chat"}]
    config["data"] = {"kind": "chat", "train": source, "valid": source, "tokenizer": "tokenizer"}
    config["training"] |= {"steps": 2, "sequence_length": 48, "eval_every": 0, "global_batch_size": 1, "eval_rows": 1}
    config["parallel"], config["model"]["num_hidden_layers"] = {}, 2
    page = (ROOT / "docs/fine_tuning.md").read_text().partition("\n## Evaluation\n")[2].partition("\n## ")[0]
    (shown,) = [line for line in page.splitlines() if line.startswith("logging: ")]
    config["logging"] = yaml.safe_load(shown)["logging"] | {"run_dir": "runs/demo", "sample_tokens": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (
        "preprocess-chat --input chat.jsonl --tokenizer tokenizer --output data/chat",
        "train config.yaml",
        "export runs/demo hf/demo",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_llm", *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()[-1])
    named = {
        row.split("`")[index] for row in page.splitlines() if row.startswith("|") and "`valid_" in row for index in (1, 3, 5)
    }
    names = {name.replace("NAME", "chat") for name in named}
    assert len(names) == 9 and names <= last.keys()
    samples = [json.loads(line) for line in (tmp_path / "runs/demo/samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in samples} == {0, 2} and all(
        line.keys() == {"step", "prompt", "reply", "ended"} for line in samples
    )
    (tmp_path / "page.md").write_text(page)
    run_commands(str(tmp_path / "page.md"), tmp_path, at_least=4)
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 2


def test_the_readmes_configuration_is_valid() -> None:
    """All keys exist, with an architecture in place of the placeholder folder."""
    from megatron_llm.config import parse_config
    from tests.runs import TINY

    (shown,) = blocks("yaml")
    parse_config(yaml.safe_load(shown) | {"model": TINY["model"]})


@pytest.mark.slow
def test_every_command_of_the_page_on_hugging_face_runs(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_commands("docs/hugging_face.md", tmp_path, at_least=12)
    again, larger = ((tmp_path / "hf" / name / "model.safetensors").read_bytes() for name in ("again", "larger"))
    assert again == larger == (tmp_path / "hf/demo/model.safetensors").read_bytes()
    assert (tmp_path / "checkpoints/together/manifest.json").is_file()


def test_the_page_on_hugging_face_lists_every_architecture() -> None:
    from docs.list_families import BEGIN, END, table
    from megatron_llm.hf.families import families

    shown = (ROOT / "docs/hugging_face.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert shown == table(), "run python docs/list_families.py"
    assert all(f"`{architecture}`" in shown for architecture in families())


def test_the_page_on_families_names_every_option_of_a_model() -> None:
    """Sizes and what names a source of weights aside."""
    from megatron_llm.config import ModelConfig

    text = (ROOT / "docs/add_a_family.md").read_text(encoding="utf-8")
    others = {
        "hf", "checkpoint", "checkpoint_ema", "resize_vocab", "vocab_size", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "initializer_range",
    }  # fmt: skip
    assert [name for name in ModelConfig.model_fields if name not in others and f"`{name}`" not in text] == []
