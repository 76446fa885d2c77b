"""Folders as they are found: old, bare, half downloaded, or with things in them that must not be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaForCausalLM

from megatron_llm.cli.main import main
from megatron_llm.hf import HFFolder
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.resolve import resolve
from tests.hf.folders import assert_same_tensors, make_folder, stored_tensors
from tests.runs import TINY
from tests.training.commands import write_config


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def to_bin(folder: Path, files: int = 1, zipped: bool = True) -> dict[str, torch.Tensor]:
    """Rewrite a folder's weights as pytorch_model.bin, or several with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return tensors
    names = {key: f"pytorch_model-{1 + number % files}.bin" for number, key in enumerate(tensors)}
    for name in set(names.values()):
        part = {key: tensor for key, tensor in tensors.items() if names[key] == name}
        torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return tensors


def round_trip(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    assert main(["import", str(folder), str(out.with_suffix(".native"))]) == 0
    assert main(["export", str(out.with_suffix(".native")), str(out)]) == 0
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    return stored_tensors(out)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_bin_folders_come_back_as_safetensors(tmp_path: Path, files: int, zipped: bool) -> None:
    make_folder(tmp_path / "hf", torch.float16)
    tensors = to_bin(tmp_path / "hf", files, zipped)
    assert_same_tensors(round_trip(tmp_path / "hf", tmp_path / "out"), tensors)


def test_both_formats_are_read_as_transformers_does(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    other = {key: tensor + 1 for key, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()}
    torch.save(other, tmp_path / "hf" / "pytorch_model.bin")
    source = HFFolder(tmp_path / "hf").source()
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()["model.norm.weight"]
    assert torch.equal(source.read(Part("final_norm.weight", (24,), ()), Box.full((24,))), theirs)


def test_a_bare_body_has_no_prefix(tmp_path: Path) -> None:
    make_folder(tmp_path / "whole", tied=True)
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf", architectures=["LlamaForCausalLM"])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert "embed_tokens.weight" in tensors and "model.embed_tokens.weight" not in tensors
    assert_same_tensors(round_trip(tmp_path / "hf", tmp_path / "out"), tensors)
    make_folder(tmp_path / "untied")
    AutoModel.from_pretrained(tmp_path / "untied").save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf", architectures=["LlamaForCausalLM"])
    (problem,) = HFFolder(tmp_path / "hf").problems()
    assert "lacks 1 tensor (lm_head.weight)" in problem


def test_a_config_without_architectures_is_known_by_its_type(tmp_path: Path) -> None:
    stored = make_folder(tmp_path / "hf")
    for architectures in ([], None):
        edit(tmp_path / "hf", architectures=architectures)
        assert HFFolder(tmp_path / "hf").family.architecture == "LlamaForCausalLM"
    assert_same_tensors(round_trip(tmp_path / "hf", tmp_path / "out"), stored)
    edit(tmp_path / "hf", model_type="t5")
    with pytest.raises(
        ValueError, match="config.json names no architecture, and model_type t5 is not supported; supported: .*llama"
    ):
        HFFolder(tmp_path / "hf")
    edit(tmp_path / "hf", model_type=None)
    with pytest.raises(ValueError, match="must name one architecture, got None"):
        HFFolder(tmp_path / "hf")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def _code(folder: Path) -> None:
    torch.save({**to_bin(folder), "a": Evil()}, folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def _absent(folder: Path) -> None:
    to_bin(folder, 3)
    (folder / "pytorch_model-2.bin").unlink()


def _foreign_index(folder: Path) -> None:
    to_bin(folder, 3)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-2.bin", "pytorch_model-7.bin"))


def _changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = to_bin(folder)
        torch.save({**tensors, name: value(tensors[name])}, folder / "pytorch_model.bin")

    return change


def _quantized(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def _code_of_its_own(folder: Path) -> None:
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
    (folder / "modeling_mine.py").write_text("open('executed', 'w')")


def _git_lfs(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (folder / "model.safetensors").write_text(text)


def _two_dtypes_no_reader(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_code, "pytorch_model.bin asks for .*, which is no part of a file of tensors and could run code; nothing was executed"),
        (_truncated, "pytorch_model.bin is truncated or not a plain file of tensors"),
        (_absent, "pytorch_model-2.bin is missing, but the index names it"),
        (_foreign_index, "pytorch_model-7.bin is missing, but the index names it"),
        (_changed("model.norm.weight", lambda t: t[:-1]), r"model.norm.weight has shape \(23,\), the model needs \(24,\)"),
        (_changed("model.norm.weight", lambda t: t.to(torch.int8)), "model.norm.weight is I8; supported: F64, F32, F16, BF16"),
        (_two_dtypes_no_reader, "model.norm.weight is F8_E4M3; supported: F64, F32, F16, BF16"),
        (_quantized, "quantization_config: quantized weights cannot be trained; take the unquantized model"),
        (_code_of_its_own, "auto_map: the model is code of the folder .*, which is never run"),
        (_git_lfs, "model.safetensors is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_cannot_be_read_is_said_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    import re

    make_folder(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "hf")
    capsys.readouterr()
    assert main(["import", "hf", "native"]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], "nothing was executed, nothing is left behind"


def test_rates_of_dropout_are_said_and_travel_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "hf")
    edit(tmp_path / "hf", attention_dropout=0.1)
    note = "dropout in config.json travels along without effect: attention_dropout 0.1; what training applies, "
    note += "training.regularization.hidden_dropout says"
    assert HFFolder(tmp_path / "hf").notes() == [f"{tmp_path / 'hf'}: {note}"]
    round_trip(tmp_path / "hf", tmp_path / "out")
    assert note in capsys.readouterr().out
    run = {"model": {"hf": str(tmp_path / "hf")}, "logging": {"run_dir": str(tmp_path / "run")}}
    resolved = resolve(write_config(tmp_path / "run.yaml", {**TINY, **run}), [], 1)
    assert any(note in found for found in resolved.notes)
