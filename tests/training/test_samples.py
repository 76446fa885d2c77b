"""Replies sampled during training: the same in every layout and as transformers', without effect on the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_llm.cli.main import main
from megatron_llm.config import ConfigError
from megatron_llm.training import loop
from megatron_llm.training.resolve import resolve
from megatron_llm.training.step import StepResult
from tests.launch import launch
from tests.test_readme import prepare
from tests.training.blends import contents, differences, logs
from tests.training.commands import read_metrics

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
ASKED = ["def main(", "import torch", "What is 1 + 1?", "class Grid:\n    pass"]
EVERY, STEPS, TOKENS = 2, 4, 9
SAMPLED = {"sample_every": EVERY, "sample_tokens": TOKENS}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2 zb_v": (2, {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
    "dp2": (2, {}),
    "tp2 pp2 interleaved": (
        4, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a chat set of four conversations made with it, and a config."""
    path = tmp_path_factory.mktemp("samples")
    prepare(path)
    (path / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} 2"}] for text in ASKED]
    (path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 4))
    chat, tokenizer = str(path / "chat.jsonl"), str(path / "tokenizer")
    assert main(["preprocess-chat", "--input", chat, "--tokenizer", tokenizer, "--output", str(path / "chat")]) == 0
    config = yaml.safe_load((path / "config.yaml").read_text())
    source = [{"path": str(path / "chat")}]
    config |= {
        "parallel": {}, "device": "cpu", "precision": {"compute": "float64"}, "lr_schedule": {"kind": "constant"},
        "data": {"kind": "chat", "train": source, "valid": source}, "optimizer": {"lr": 0.01},
        "checkpoint": {"every_steps": EVERY + 1},  # not when it is sampled: a save waits for the weights, too
        "training": {"sequence_length": 48, "global_batch_size": 4, "steps": STEPS, "seed": 5, "eval_rows": 4},
    }  # fmt: skip
    config["model"] |= {"num_hidden_layers": 4, "initializer_range": 0.2}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def _train(folder: Path, name: str, layout: str, **settings: Any) -> Path:
    world, parallel = LAYOUTS[layout]
    run = folder / name
    changed = {"logging": {"run_dir": str(run), **settings.pop("logging", SAMPLED)}, "parallel": parallel, **settings}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | changed))
    endings = launch(world, main, ["train", str(config)])
    assert [ending.code for ending in endings] == [0] * world, logs(endings)
    (run / "log").write_text(endings[0].log)
    return run


def _samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    return _train(folder, "single", "single", data=data | {"tokenizer": str(folder / "tokenizer")})


def test_replies_are_those_of_transformers(folder: Path, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = _samples(single)
    assert [line["step"] for line in found] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert main(["export", str(single), str(folder / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [0, stop], "replies end where the template ends them"
    for line, asked in zip(found[-3:], ASKED, strict=False):
        assert line["prompt"] == f"user\n{asked}<|im_end|>\nassistant\n"
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert line["reply"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert line["ended"] == (int(expected[-1]) in (0, stop))
    assert len({line["reply"] for line in found}) > 3
    log = (single / "log").read_text()
    assert (
        "step 4 | sample 1 of 3, " in log
        and "    prompt | user\n    prompt | def main(<|im_end|>\n    prompt | assistant\n" in log
    )
    assert "    reply | " in log


@pytest.mark.parametrize(
    "layout", [name if name == "pp2 zb_v" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "single"]
)
def test_replies_do_not_depend_on_the_layout(folder: Path, single: Path, layout: str) -> None:
    assert _samples(_train(folder, layout.replace(" ", "-"), layout)) == _samples(single)


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_sampling_has_no_effect(folder: Path, layout: str) -> None:
    """On any number to the bit, in float32, where weights are still on their way when the step ends."""
    settings: dict[str, Any] = {"precision": {"compute": "float32"}}
    runs = [
        _train(folder, f"{name}-{layout}", layout, logging=logging, **settings)
        for name, logging in (("with", SAMPLED | {"sample_every": 1, "sample_temperature": 1.0}), ("without", {}))
    ]
    lines = [[(line["loss"], line["grad_norm"]) for line in read_metrics(run) if "loss" in line] for run in runs]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS
    ends = [contents(run / "checkpoints", STEPS) for run in runs]
    assert not differences(*ends)
    assert not (runs[1] / "samples.jsonl").exists()


def test_a_run_that_goes_on_has_every_sample_once(folder: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the step where it was stopped; what it had said of steps that it takes again is replaced."""
    config = yaml.safe_load((folder / "single.yaml").read_text())
    run, step = folder / "parts", loop._step
    config["logging"]["run_dir"] = str(run)
    (folder / "parts.yaml").write_text(yaml.safe_dump(config))

    def stopped(run: loop.Run) -> tuple[StepResult, dict[str, Any]]:
        result, values = step(run)
        return replace(result, votes=(int(run.state.step == EVERY), 0)), values

    monkeypatch.setattr(loop, "_step", stopped)
    assert main(["train", str(folder / "parts.yaml")]) == 75
    assert [line["step"] for line in _samples(run)] == [0, 0, 0]
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": "of a run that died", "reply": "", "ended": true}\n')
    monkeypatch.undo()
    assert main(["train", str(folder / "parts.yaml")]) == 0
    assert _samples(run) == _samples(single)
    assert [line["step"] for line in read_metrics(run) if "valid_loss" in line] == [0, STEPS], "no evaluation was due"


def _problems(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(str(folder / "config.yaml"), ["logging.sample_every=1", *overrides], 1)
    return str(caught.value)


def test_what_cannot_be_sampled_is_found_before_the_run(folder: Path, tmp_path: Path) -> None:
    assert "data.tokenizer" in _problems(folder, "data.kind=synthetic")
    tokenizer = f"data.tokenizer={folder / 'tokenizer'}"
    assert "logging.sample_prompts: no validation set is of kind chat" in _problems(folder, "data.kind=synthetic", tokenizer)
    assert "logging.sample_prompts: the list is empty" in _problems(folder, "logging.sample_prompts=[]")
    assert "absent.txt" in _problems(folder, f"logging.sample_prompts={tmp_path / 'absent.txt'}")
    (tmp_path / "bad.jsonl").write_text('"fine"\n\n{"text": 1}\n')
    assert "bad.jsonl, line 3: neither a string" in _problems(folder, f"logging.sample_prompts={tmp_path / 'bad.jsonl'}")
    learned = ["model.position_embedding=learned", "model.max_position_embeddings=48", "logging.sample_tokens=60"]
    assert "no conversation begins with 1 to -11 tokens" in _problems(folder, *learned)
    given = "logging.sample_prompts=[hello]"
    assert "60 are to follow, but the model has 48 learned positions" in _problems(folder, *learned, given)
    meta = json.loads((folder / "chat.meta.json").read_text())
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx", ".roles.bin"):
        moved.with_suffix(suffix).write_bytes((folder / f"chat{suffix}").read_bytes())
    moved.with_suffix(".meta.json").write_text(json.dumps(meta | {"tokenizer": "/gone"}))
    sources = f"[{{path: {moved}}}]"
    assert "the tokenizer of the data set: /gone is not a tokenizer folder" in _problems(
        folder, f"data.train={sources}", f"data.valid={sources}"
    )


def test_prompts_that_nobody_replies_to_are_noted(folder: Path) -> None:
    given = "logging.sample_prompts=[hi]"
    notes = [resolve(str(folder / "config.yaml"), [f"logging.sample_every={every}", given], 1).notes for every in (0, 1)]
    assert [note for note in notes[0] if note not in notes[1]] == [
        "logging.sample_prompts: has no effect while logging.sample_every is 0; set it to the steps between replies"
    ]


def test_adapters_are_sampled_as_they_are_trained(folder: Path) -> None:
    """Beside frozen weights, on ranks whose training is sequence parallel; `generate` has them merged."""
    run = _train(folder, "adapters", "tp2", peft={"rank": 4, "alpha": 64}, optimizer={"lr": 0.1})
    found = _samples(run)
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in ASKED[:3]]
    (folder / "asked.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    options = [
        "--prompts",
        str(folder / "asked.jsonl"),
        "--output",
        str(folder / "replies.jsonl"),
        "--max-new-tokens",
        str(TOKENS),
    ]
    assert main(["generate", "--checkpoint", str(run), "--tokenizer", str(folder / "tokenizer"), *options]) == 0
    replies = [json.loads(line)["reply"] for line in (folder / "replies.jsonl").read_text().splitlines()]
    assert [line["reply"] for line in found[-3:]] == replies
    assert [line["reply"] for line in found[:3]] != replies, "they have learned"
