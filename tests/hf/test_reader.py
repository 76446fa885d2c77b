"""Reading Hugging Face folders: every rectangle against the safetensors library, and every kind of damage by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llm.config import ModelConfig
from megatron_llm.hf import HFFolder
from megatron_llm.parallel.shard import Box, Part
from tests.hf.folders import LLAMA3, make_folder

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_folder(tmp_path / "hf", shard="16KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def _model(folder: Path) -> ModelConfig:
    return ModelConfig(**HFFolder(folder).model_fields())


def _read(folder: Path, name: str, shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
    return HFFolder(folder).source().read(Part(name, shape, ()), box or Box.full(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("shard", "old"), [("5GB", False), ("16KB", True)])
def test_every_box_is_what_the_library_reads(tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str, old: bool) -> None:
    stored = make_folder(tmp_path, dtype, tied, shard, LLAMA3, old)
    folder = HFFolder(tmp_path)
    assert folder.problems() == []
    assert folder.tensor_dtypes() == dict.fromkeys(stored, NAMES[dtype])
    source = folder.source()
    model = _model(tmp_path)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for tensor in folder.family.stored_tensors(model):
        seen.add(tensor.name)
        logical = tensor.pieces[0].name
        for _ in range(5):
            offset = tuple(int(torch.randint(0, size, (), generator=generator)) for size in tensor.shape)
            ends = (int(torch.randint(o + 1, n + 1, (), generator=generator)) for n, o in zip(tensor.shape, offset, strict=True))
            box = Box(offset, tuple(end - start for start, end in zip(offset, ends, strict=True)))
            values = source.read(Part(logical, tensor.shape, ()), box)
            assert values.dtype == dtype and values.is_contiguous()
            assert torch.equal(values, stored[tensor.name][box.slices])
            values.fill_(1e4)  # the caller's own: the next read must not see it
        assert torch.equal(source.read(Part(logical, tensor.shape, ()), Box.full(tensor.shape)), stored[tensor.name])
    assert seen == stored.keys()


def test_checking_a_folder_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from megatron_llm.hf import HFFolder; "
        f"f = HFFolder({str(folder)!r}); f.model_fields(); f.source(); assert f.problems() == []; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (result.stdout.strip(), result.stderr) == ("False", "")


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_truncated_file_is_named_with_its_size(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    (problem,) = HFFolder(folder).problems()
    assert str(file) in problem and "is truncated" in problem and f"{len(content[:keep])} bytes" in problem
    if keep < 0:
        assert f"says {len(content)}" in problem
    with pytest.raises(ValueError, match="is truncated"):
        HFFolder(folder).source()


def test_longer_file_and_damaged_header_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    assert "bytes after its last tensor" in HFFolder(folder).problems()[0]
    file.write_bytes(content[:8] + b"}" + content[9:])
    assert "header of" in HFFolder(folder).problems()[0] and str(file) in HFFolder(folder).problems()[0]
    file.write_bytes(content.replace(b"[67,24]", b"[67,25]", 1))
    assert "the header is damaged" in HFFolder(folder).problems()[0]


def test_missing_shard_and_index_that_lies(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    (problem,) = HFFolder(sharded).problems()
    assert "holds ghost.weight, but it does not" in problem
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    assert any(f"{victim} is missing" in problem for problem in HFFolder(sharded).problems())
    content["weight_map"]["ghost.weight"] = "../other/model.safetensors"
    index.write_text(json.dumps(content))
    assert "points out of its folder" in HFFolder(sharded).problems()[0]
    index.write_text("{")
    assert "is damaged" in HFFolder(sharded).problems()[0]


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    save_file({**load_file(first), next(iter(tensors)): next(iter(tensors.values()))}, first)
    assert any(f"is both in {first.name} and in {second.name}" in problem for problem in HFFolder(sharded).problems())


def test_missing_wrong_and_extra_tensors_are_all_reported(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors[Q1] = torch.zeros(31, 24)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.embed_tokens.weight"] = torch.zeros(67, 24, dtype=torch.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # computed: not an extra
    save_file(tensors, file)
    text = "\n".join(HFFolder(folder).problems())
    assert f"{folder} lacks 1 tensor (model.norm.weight) of a model with 2 layers" in text
    assert f"{file}: {Q1} has shape (31, 24), the model needs (32, 24)" in text
    assert "holds 1 tensor (model.layers.0.self_attn.q_proj.bias)" in text
    assert "model.embed_tokens.weight is I8; supported: F64, F32, F16, BF16" in text
    assert len(text.splitlines()) == 4
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in HFFolder(folder).tensor_dtypes()


def test_fewer_layers_than_stored_would_lose_tensors(folder: Path) -> None:
    model = _model(folder).model_copy(update={"num_hidden_layers": 1})
    (problem,) = HFFolder(folder).problems(model)
    assert "holds 9 tensors" in problem and "and 4 more" in problem and "would be lost" in problem


def test_tied_folder_with_another_head_is_refused_when_read(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, tied=True)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(_read(tmp_path, "embedding.weight", (67, 24)), embedding)
    other = embedding.clone()
    other[66, 23] += 1
    save_file({**tensors, "lm_head.weight": other}, tmp_path / "model.safetensors")
    assert torch.equal(_read(tmp_path, "embedding.weight", (67, 24), Box((0, 0), (66, 24))), embedding[:66])
    with pytest.raises(ValueError, match="differs from model.embed_tokens.weight, but config.json says tie_word_embeddings"):
        _read(tmp_path, "embedding.weight", (67, 24), Box((60, 0), (7, 24)))


def test_reading_what_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no layers.2.mlp.up.weight"):
        _read(folder, "layers.2.mlp.up.weight", (40, 24))
    with pytest.raises(ValueError, match=r"\(68, 24\) in the model, \(67, 24\) in model.embed_tokens.weight"):
        _read(folder, "embedding.weight", (68, 24))


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        HFFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no config.json"):
        HFFolder(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in HFFolder(folder).problems()[0]
    config = json.loads((folder / "config.json").read_text())
    for architectures, message in [(["T5Model"], "T5Model is not supported"), ("x", "got x"), (["a", "b"], "must name one")]:
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match=message):
            HFFolder(folder)
    for damaged in ('{"a": ', "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="config.json is not JSON"):
            HFFolder(folder)
