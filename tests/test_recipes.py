"""examples/recipes: the published models, layouts as `plan` proposes them, figures that are recomputed, commands that run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_llm.cli.main import main as cli
from megatron_llm.config import Config, ConfigError
from megatron_llm.models.stages import whole_model
from megatron_llm.planning.compare import GIB, SPARE
from megatron_llm.training.resolve import resolve
from tests.test_readme import blocks, copy_tree, prepare
from tools import plan_recipes
from tools.plan_recipes import DEVICE, GPUS, MODELS, RECIPES, figures, layout_file, line, recipe, table_lines

PHASES = ("continue", "sft")
TOKENS = 2**19  # of a step
TABLE = table_lines((RECIPES / "README.md").read_text(encoding="utf-8"))
LAYOUTS = [(name, gpus) for name in MODELS for gpus in GPUS if layout_file(name, gpus).is_file()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Config-only folders of the published dimensions."""
    parent = tmp_path_factory.mktemp("models")
    return {name: plan_recipes.model_folder(name, parent) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_published_one(name: str, folders: dict[str, Path]) -> None:
    model = whole_model(recipe(name, "continue", folders[name]).model, torch.float32, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name].parameters


@pytest.mark.parametrize("name", MODELS)
def test_both_phases_train_alike_on_any_number_of_gpus(name: str, folders: dict[str, Path]) -> None:
    """The same tokens a step, the same layout fits both, and nothing but layout, adapters and dtypes of state differs."""
    bases = {phase: recipe(name, phase, folders[name]) for phase in PHASES}
    assert bases["sft"].data.kind == "chat" and bases["sft"].data.train_on == "assistant"
    assert bases["continue"].data.kind == "pretrain" and bases["continue"].data.valid
    for phase, base in bases.items():
        assert base.training.global_batch_size * base.training.sequence_length == TOKENS
        assert base.training.sequence_length <= base.model.max_position_embeddings
        for gpus in GPUS:
            if (name, gpus) in LAYOUTS:
                config = recipe(name, phase, folders[name], [str(layout_file(name, gpus))])
                assert _problems_without_files(name, phase, gpus, folders[name]) == []
                assert _changed(base, config) <= {
                    "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.pipeline_schedule",
                    "parallel.virtual_stages", "training.micro_batch_size", "training.recompute", "peft",
                    "optimizer.state_dtype", *(["optimizer.lr"] if config.peft else []),
                }  # fmt: skip


def _problems_without_files(name: str, phase: str, gpus: int, folder: Path) -> list[str]:
    """What `train` on so many ranks would say against a recipe, but that there are no weights and no data here."""
    with pytest.raises(ConfigError) as caught:
        resolve(RECIPES / name / f"{phase}.yaml", [str(layout_file(name, gpus)), f"model.hf={folder}"], gpus)
    missing = f"{folder} has no weights", "data.train.0.path: data/", "data.valid.0.path: data/", "data.tokenizer: data/"
    return [problem for problem in caught.value.problems if not problem.startswith(missing)]


def _changed(before: Config, after: Config) -> set[str]:
    old, new = before.model_dump(), after.model_dump()
    changed = set()
    for section, values in new.items():
        if not isinstance(values, dict) or old[section] is None:
            changed |= {section} if values != old[section] else set()
        else:
            changed |= {f"{section}.{key}" for key, value in values.items() if value != old[section][key]}
    return changed


def test_every_model_has_a_line_for_every_number_of_gpus() -> None:
    assert list(TABLE) == [(name, gpus) for name in MODELS for gpus in GPUS]
    for key, text in TABLE.items():
        assert (key in LAYOUTS) != ("nothing fits" in text), key
    found = {path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml")}
    expected = {Path(name) / f"{phase}.yaml" for name in MODELS for phase in PHASES}
    assert found == expected | {layout_file(*key).relative_to(RECIPES) for key in LAYOUTS}


@pytest.mark.parametrize(("name", "gpus"), LAYOUTS, ids=str)
def test_the_table_has_what_is_predicted_of_the_files(name: str, gpus: int, folders: dict[str, Path]) -> None:
    """It fits, and the layout costs both phases the same."""
    (way,) = [way for way in plan_recipes.WAYS if f"| {way.name} |" in TABLE[name, gpus]]
    config, tuned = (recipe(name, phase, folders[name], [str(layout_file(name, gpus))]) for phase in PHASES)
    row = figures(config, gpus)
    assert row.peak <= (1 - SPARE) * DEVICE.memory * GIB
    assert line(name, gpus, way.name, row) == TABLE[name, gpus], "run python tools/plan_recipes.py"
    assert _changed(config, tuned) <= {
        "data.kind", "data.train", "data.valid", "data.tokenizer", "data.overlong", "logging.run_dir", "logging.sample_every",
        "logging.sample_tokens", "training.steps", "training.eval_every", "optimizer.lr", "optimizer.weight_decay",
        "lr_schedule.kind", "lr_schedule.warmup_steps", "lr_schedule.min_lr_ratio",
    }  # fmt: skip
    reasons = [text for text in layout_file(name, gpus).read_text(encoding="utf-8").splitlines() if "Does not fit" in text]
    assert len(reasons) == plan_recipes.WAYS.index(way)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), [("pythia-1.4b", 8), ("llama-3.1-8b", 1), ("llama-3.1-70b", 1)])
def test_planned_anew_it_is_the_same(name: str, gpus: int, folders: dict[str, Path]) -> None:
    """A layout of all weights, one of adapters, and a model that does not fit."""
    planned = plan_recipes.plan(name, gpus, folders[name])
    if planned.row is None:
        assert (name, gpus) not in LAYOUTS
    else:
        assert layout_file(name, gpus).read_text(encoding="utf-8") == plan_recipes.layout_text(name, gpus, planned)
    assert plan_recipes.table_line(name, gpus, planned) == TABLE[name, gpus]


def _shrunk(file: Path) -> dict[str, Any]:
    """A recipe's file as it is, but for sizes and numbers of steps, and layouts, which are those of one rank."""
    raw: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "parallel" in raw:
        raw["parallel"] = {"tensor_parallel": 1, "pipeline_parallel": 1}
        raw["training"]["micro_batch_size"] = 1
        return raw
    raw["training"] |= {"sequence_length": 64, "global_batch_size": 4, "eval_every": 2, "eval_rows": 4}
    raw["training"] |= {"steps": 2} if raw["training"]["steps"] > 0 else {}
    raw["checkpoint"]["every_steps"] = 1
    raw["logging"] |= {"sample_every": 2, "sample_tokens": 4} if "sample_every" in raw["logging"] else {}
    return raw


def _small(model: str, folder: Path) -> None:
    """hf/NAME in `folder`: the recipe's model with its kind of layers, tiny, and weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if model != "qwen2.5-7b":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "hf" / model)
    published = MODELS[model]
    dimensions = published.dimensions | {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "num_kv_heads": 2}
    dimensions |= {key: size for key, size in sizes.items() if key in dimensions}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(published.kind, **dimensions)).save_pretrained(folder / "hf" / model)


def _text(folder: Path) -> None:
    """The files that the README of the recipes begins with."""
    prepare(folder)
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join(lines[:8]))
    (folder / "text_valid.jsonl").write_text("".join(lines[8:10]))
    shutil.copy(folder / "chat.jsonl", folder / "chat_valid.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus"), [("qwen2.5-7b", 8), ("falcon-40b", 8), ("starcoder2-7b", 1)])
def test_a_recipe_trains(model: str, gpus: int, tmp_path: Path) -> None:
    """Both phases, the second from the first; adapters and cheap state among them."""
    _text(tmp_path)
    _small(model, tmp_path)
    named = {phase: RECIPES / model / f"{phase}.yaml" for phase in PHASES} | {"layout": layout_file(model, gpus)}
    for name, file in named.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(_shrunk(file)))
    template = [] if model == "qwen2.5-7b" else ["--template", "tulu", "--save-tokenizer", "data/tokenizer"]
    tokenizer, first = f"hf/{model}", f"runs/{model}-continue"
    with contextlib.chdir(tmp_path):
        for split in ("", "_valid"):
            _run("preprocess", "--input", f"text{split}.jsonl", "--tokenizer", tokenizer, "--output", f"data/text{split}")
        _run("preprocess-chat", "--input", "chat.jsonl", "--tokenizer", tokenizer, *template, "--output", "data/chat")
        tokenizer = "data/tokenizer" if template else tokenizer
        _run("preprocess-chat", "--input", "chat_valid.jsonl", "--tokenizer", tokenizer, "--output", "data/chat_valid")
        _run("train", "continue.yaml", "layout.yaml")
        _run("train", "sft.yaml", "layout.yaml", "model.hf=", f"model.checkpoint={first}")
    for phase in PHASES:
        run = tmp_path / "runs" / f"{model}-{phase}"
        assert json.loads((run / "status.json").read_text())["outcome"] == "done"
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        assert [entry for entry in lines if "loss" in entry] and "valid_loss" in lines[-1]
        resolved = yaml.safe_load((run / "config.yaml").read_text())
        assert (resolved["peft"] is not None) == ("LoRA" in TABLE[model, gpus])
    assert (tmp_path / "runs" / f"{model}-sft" / "samples.jsonl").is_file()


def _run(*command: str) -> None:
    assert cli(list(command)) == 0


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("hf/llama-3.1-8b", "model.hf: hf/llama-3.1-8b is not a folder; expected a Hugging Face model folder"),
        ("data", "data/text.idx"),
    ],
)
def test_what_is_missing_is_named(
    missing: str, said: str, tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(RECIPES / "llama-3.1-8b/continue.yaml"), str(layout_file("llama-3.1-8b", 1))]
    given = [] if missing.startswith("hf") else [f"model.hf={folders['llama-3.1-8b']}"]
    with contextlib.chdir(tmp_path):
        assert cli(["train", *files, *given]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    """As written, on two ranks, where hf/, the text and the conversations are tiny, and so is what the recipe makes of them."""
    _text(tmp_path)
    _small("llama-3.1-8b", tmp_path)
    copy_tree(RECIPES.parent, tmp_path / "examples")
    for file in (RECIPES / "llama-3.1-8b").glob("*.yaml"):
        (tmp_path / "examples/recipes/llama-3.1-8b" / file.name).write_text(yaml.safe_dump(_shrunk(file)))
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2", "PATH": f"{scripts}:{os.environ['PATH']}"}
    environment["PYTHON"] = sys.executable
    commands = [text for block in blocks("", "examples/recipes/README.md") for text in block.splitlines()]
    assert len(commands) == 11
    for command in commands:
        for phase in PHASES:
            if f"{phase}.yaml" in command and "plan" not in command:  # each is one way to do it
                shutil.rmtree(tmp_path / f"runs/llama-3.1-8b-{phase}", ignore_errors=True)
        here = command.replace("HEAD_NODE=node1 NNODES=8", "HEAD_NODE=localhost NNODES=1")
        done = subprocess.run(
            here, shell=True, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "hf/llama-3.1-8b-tuned/model.safetensors").is_file() and (tmp_path / "layout.yaml").is_file()
