"""`model.resize_vocab`: new rows are the mean of the others, as in transformers, on every layout, and stay with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_llm.checkpoint import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import ConfigError
from megatron_llm.models.vocabulary import ResizedVocabulary
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.resolve import resolve
from tests.hf.folders import assert_same_tensors, make_folder, make_tokenizer, stored_tensors
from tests.training.commands import run_train, write_config
from tests.training.test_runs import state_of, tiny

STORED, SIZE = 67, 80
NEW = ("model.embed_tokens.weight", "lm_head.weight")


def config(tmp_path: Path, run: str, **sections: dict[str, Any]) -> Path:
    raw = tiny(tmp_path / run, **sections)
    raw["model"] = {"hf": str(tmp_path / "hf"), "resize_vocab": SIZE, **sections.get("model", {})}
    return write_config(tmp_path / f"{run}.yaml", raw)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_gives_what_transformers_gives(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    stored = make_folder(tmp_path / "hf", dtype, tied)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "native"), "--resize-vocab", str(SIZE)]) == 0
    assert open_checkpoint(tmp_path / "native").model.vocab_size == SIZE
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out")]) == 0
    exported = stored_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == SIZE
    for name in stored.keys() & set(NEW):
        assert exported[name].shape == (SIZE, 24) and torch.equal(exported[name][:STORED], stored[name])
        assert torch.equal(exported[name][STORED:], stored[name].double().mean(0).to(dtype).expand(SIZE - STORED, 24))
    assert_same_tensors(*({key: value for key, value in side.items() if key not in NEW} for side in (exported, stored)))

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.resize_token_embeddings(SIZE, mean_resizing=True)  # draws from a distribution that is narrow around the mean
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-2)


def test_a_run_resizes_and_goes_on(tmp_path: Path) -> None:
    """Under TP2 it begins with what `import` writes, and interrupted is uninterrupted."""
    make_folder(tmp_path / "hf", torch.bfloat16)
    sections: dict[str, Any] = {"training": {"steps": 4}, "lr_schedule": {"kind": "constant", "min_lr": 0.0}}
    layout = {"parallel": {"tensor_parallel": 2}}
    whole, parts = config(tmp_path, "whole", **sections, **layout), config(tmp_path, "parts", **sections, **layout)
    run_train(2, parts, "training.steps=0")
    begun = open_checkpoint(tmp_path / "parts/checkpoints/step-00000000")
    assert begun.model.vocab_size == SIZE and begun.tensors("weights")["embedding.weight"].shape == (SIZE, 24)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "native"), "--resize-vocab", str(SIZE)]) == 0
    imported = state_of(open_checkpoint(tmp_path / "native"))
    assert_same_tensors(
        {name: value for name, value in state_of(begun).items() if name.startswith("weights/")},
        {name: value.float() for name, value in imported.items()},
    )
    run_train(2, parts, "training.steps=2")
    run_train(2, parts)
    run_train(2, whole)
    a, b = (open_checkpoint(tmp_path / f"{run}/checkpoints/step-00000004") for run in ("whole", "parts"))
    assert_same_tensors(state_of(a), state_of(b))
    assert main(["export", str(tmp_path / "parts"), str(tmp_path / "out")]) == 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == SIZE

    # A phase that begins with it may add more, and one without the setting takes what is there.
    later = {**tiny(tmp_path / "later"), "model": {"checkpoint": str(tmp_path / "parts")}}
    file = write_config(tmp_path / "later.yaml", later)
    assert resolve(file, [], 1).config.model.vocab_size == SIZE
    assert resolve(file, ["model.resize_vocab=90"], 1).config.model.vocab_size == 90
    with pytest.raises(ConfigError, match=f"a vocabulary of 70 tokens is smaller than the {SIZE} of "):
        resolve(file, ["model.resize_vocab=70"], 1)
    run_train(1, file, "model.resize_vocab=90", "training.steps=0")
    last = state_of(open_checkpoint(tmp_path / "later/checkpoints/step-00000000"))
    assert last["weights/head.weight"].shape == (90, 24)


def test_fewer_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "native"), "--resize-vocab", "66"]) == 1
    said = capsys.readouterr().err
    assert f"a vocabulary of 66 tokens is smaller than the 67 of {tmp_path / 'hf'}; rows are added, never dropped" in said
    assert not (tmp_path / "native").exists()
    with pytest.raises(ConfigError, match="model.hf: a vocabulary of 66 tokens is smaller than the 67 of"):
        resolve(config(tmp_path, "run", model={"resize_vocab": 66}), [], 1)
    with pytest.raises(ConfigError, match="goes with model.hf or model.checkpoint; give a new model its vocab_size"):
        resolve(write_config(tmp_path / "new.yaml", tiny(tmp_path / "new", model={"resize_vocab": 100})), [], 1)
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "hf"), str(tmp_path / "native"), "--resize-vocab", "-3"])


def test_as_many_as_the_tokenizer_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padding rows of a model with more than its tokenizer stay; a run is told of a tokenizer with more than its model."""
    make_folder(tmp_path / "hf")
    make_tokenizer(tmp_path / "small")
    large = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    large["model"]["vocab"] |= {f"w{number}": 100 + number for number in range(8)}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(large))
    for name, size in (("small", STORED), ("large", 108)):
        command = ["import", str(tmp_path / "hf"), str(tmp_path / f"native {name}"), "--tokenizer", str(tmp_path / name)]
        assert main([*command, "--resize-vocab", "tokenizer"]) == 0
        assert open_checkpoint(tmp_path / f"native {name}").model.vocab_size == size
    assert "vocabulary: 108 tokens, 41 of them new: the mean of the others" in capsys.readouterr().out

    file = config(tmp_path, "run", model={"resize_vocab": 0}, data={"tokenizer": str(tmp_path / "large")})
    (note,) = resolve(file, [], 1).notes
    assert note.endswith("large has 108 tokens, the model 67; model.resize_vocab=108 gives it all")
    assert resolve(file, ["model.resize_vocab=108"], 1).notes == ()


def test_a_run_is_told_of_new_rows_that_are_frozen(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    file = config(tmp_path, "run", peft={"kind": "lora"})
    (note,) = resolve(file, [], 1).notes
    assert f"tokens {STORED} to {SIZE - 1} begin alike and are frozen" in note
    assert resolve(file, ['optimizer.rules=[{match: "[eh]*.weight", frozen: false}]'], 1).notes == ()  # what it advises
    assert resolve(config(tmp_path, "all"), [], 1).notes == ()


def test_the_mean_does_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        tensors = {"embedding.weight": torch.randn(1000, 7), "head.bias": torch.randn(1000)}

        def dtype(self, name: str) -> str:
            return "F32"

        def read(self, part: Part, box: Box) -> torch.Tensor:
            return self.tensors[part.name][box.slices]

    for name, tensor in Source.tensors.items():
        whole = Part(name, (1010, *tensor.shape[1:]), ())
        box = Box((900, *(2 for _ in tensor.shape[1:])), (110, *(3 for _ in tensor.shape[1:])))
        expected = tensor.double().mean(0).float()
        for elements in (1 << 22, 70):
            monkeypatch.setattr("megatron_llm.parallel.shard._SLAB_ELEMENTS", elements)
            values = ResizedVocabulary(Source(), 1000, 1010).read(whole, box)
            assert torch.equal(values[:100], tensor[900:, 2:5] if tensor.dim() == 2 else tensor[900:])
            torch.testing.assert_close(values[100:], expected[2:5].expand(10, 3) if tensor.dim() == 2 else expected.expand(10))
