"""Folder -> checkpoint cut at odd places by several ranks -> folder: bitwise the same, and transformers loads it.

Also what `megatron-llm export` refuses, changes on request, and writes for models that came from no folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_llm.checkpoint import TensorToSave, checkpoint_folder
from megatron_llm.checkpoint.save import Contents, commit, write_rank_file
from megatron_llm.cli.export import parse_size
from megatron_llm.cli.main import main
from megatron_llm.config import ModelConfig
from megatron_llm.hf import HFFolder, collect_assets, export_hf
from megatron_llm.hf.assets import exported_files
from megatron_llm.models.names import logical_tensors
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.parallel.shard import Box, Part, ShardSpec, pieces
from tests.hf.folders import LLAMA3, assert_same_tensors, make_folder, make_tokenizer, stored_tensors

RANKS = 3


class Values:
    """A TensorSource made of a dictionary."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def read(self, part: Part, box: Box) -> torch.Tensor:
        return self.tensors[part.name][box.slices]


def save_from_folder(folder: Path, run: Path, compute: str = "float32", **model: Any) -> Path:
    """What a run does at step 0: float32 masters from the folder, flat slices of each tensor on RANKS ranks."""
    hf = HFFolder(folder)
    config = {
        "model": {**hf.model_fields(), "hf": str(folder), **model},
        "training": {"sequence_length": 64, "global_batch_size": 1, "steps": 0},
        "optimizer": {"lr": 1e-3},
        "precision": {"compute": compute},
    }
    source = hf.source()
    owned: list[list[TensorToSave]] = [[] for _ in range(RANKS)]
    for name, shape in logical_tensors(ModelConfig(**hf.model_fields())):
        whole = Box.full(shape)
        part = Part(name, shape, ((whole, whole),))
        numel = whole.numel
        cuts = [0, numel // 3 + 1, numel // 3 + 2, numel]
        flat = source.read(part, whole).float().reshape(-1)
        for rank in range(RANKS):
            lo, hi = cuts[rank], cuts[rank + 1]
            for piece in pieces(ShardSpec((part,)), shape, lo, hi):
                owned[rank].append(TensorToSave("weights", part.name, part.shape, piece.box, piece.view(flat[lo:hi])))
    step = checkpoint_folder(run / "checkpoints", 0)
    step.make()
    contents = Contents({"step": 0}, config, collect_assets(folder))
    commit(step, [write_rank_file(step, rank, owned[rank]) for rank in range(RANKS)], contents)
    return Path(str(step))


def assert_loads(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """transformers finds every tensor, no other, and the values."""
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    loaded = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("shard", "old"), [("16KB", False), ("5GB", True)], ids=["new spelling", "old spelling"])
@pytest.mark.parametrize("rope", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}], ids=["", "llama3", "linear"])
def test_round_trip_is_bitwise(
    tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str, old: bool, rope: dict[str, Any] | None
) -> None:
    stored = make_folder(tmp_path / "hf", dtype, tied, shard, rope, old)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}\r\nü")
    save_from_folder(tmp_path / "hf", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--shard-size", "16KB"]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored)
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert_loads(tmp_path / "out", stored)


def test_tied_folder_with_stored_head_gets_it_back_and_mixed_dtypes_stay(tmp_path: Path) -> None:
    stored = make_folder(tmp_path / "hf", torch.bfloat16, tied=True)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.norm.weight"] = stored["model.norm.weight"].float() + 1e-4
    save_file(stored, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    save_from_folder(tmp_path / "hf", tmp_path / "run")
    assert main(["export", str(tmp_path / "run" / "checkpoints"), str(tmp_path / "out")]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored)
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("old", [False, True], ids=["dtype", "torch_dtype"])
def test_dtype_on_request_changes_values_and_one_field(tmp_path: Path, old: bool) -> None:
    stored = make_folder(tmp_path / "hf", torch.float32, old_spelling=old)
    step = save_from_folder(tmp_path / "hf", tmp_path / "run")
    assert main(["export", str(step), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in stored.items()})
    config, patched = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out"))
    field = "torch_dtype" if old else "dtype"
    assert patched.pop(field) == "bfloat16" and config.pop(field) == "float32"
    assert patched == config
    assert_loads(tmp_path / "out", {name: tensor.bfloat16() for name, tensor in stored.items()})


def test_a_model_changed_by_the_run_is_exported_as_changed(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", old_spelling=True, rope={"rope_type": "linear", "factor": 2.0})
    step = save_from_folder(tmp_path / "hf", tmp_path / "run", rope_theta=1e6, max_position_embeddings=4096)
    assert main(["export", str(step), str(tmp_path / "out")]) == 0
    config, patched = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out"))
    assert (patched["rope_theta"], patched["max_position_embeddings"]) == (1e6, 4096)
    assert {**config, "rope_theta": 1e6, "max_position_embeddings": 4096, "rope_scaling": patched["rope_scaling"]} == patched
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").config
    assert loaded.rope_parameters["rope_theta"] == 1e6 and loaded.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(
    ("compute", "dtype", "tied"),
    [("bfloat16", torch.bfloat16, False), ("float32", torch.float32, True), ("float64", torch.float32, False)],
)
def test_model_from_scratch(tmp_path: Path, compute: str, dtype: torch.dtype, tied: bool) -> None:
    """Nothing but a ModelConfig and a tokenizer folder: transformers must find the model, its dtype and its tokenizer."""
    stored = make_folder(tmp_path / "hf", torch.bfloat16, tied, rope=LLAMA3)
    make_tokenizer(tmp_path / "tokenizer")
    step = save_from_folder(tmp_path / "hf", tmp_path / "run", compute, hf=None, max_position_embeddings=0)
    manifest = step / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.unlink()
    assets = collect_assets(None, tmp_path / "tokenizer")
    assert "hf/config.json" not in assets
    source = HFFolder(tmp_path / "hf").source()
    owned = [
        TensorToSave("weights", name, tuple(entry["shape"]), box, source.read(Part(name, box.shape, ()), box))
        for name, entry in content["tensors"]["weights"].items()
        for box in [Box.full(tuple(entry["shape"]))]
    ]
    commit(LocalFolder(step), [write_rank_file(LocalFolder(step), 0, owned)], Contents({}, content["config"], assets))
    assert main(["export", str(step), str(tmp_path / "out")]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), {name: tensor.to(dtype) for name, tensor in stored.items()})
    assert_loads(tmp_path / "out", stored)
    config = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").config
    assert (config.dtype, config.max_position_embeddings, config.rope_parameters["factor"]) == (dtype, 64, 8.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a c <|end|>")["input_ids"] == [0, 2, tokenizer.eos_token_id]
    ids = (config.eos_token_id, config.pad_token_id, config.bos_token_id)
    assert ids == (tokenizer.eos_token_id, tokenizer.pad_token_id, None) and ids[0] not in (None, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"


def test_tokenizer_folder_replaces_the_models(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (tmp_path / "hf" / "README.md").write_text("not part of the model")
    make_tokenizer(tmp_path / "tokenizer")
    own = collect_assets(tmp_path / "hf")
    names = ("config.json", "generation_config.json", "tensor_dtypes.json", "tokenizer.model")
    assert set(own) == {f"hf/{name}" for name in names}
    assert own["hf/tokenizer.model"] == b"\x00sentencepiece"
    both = collect_assets(tmp_path / "hf", tmp_path / "tokenizer")
    assert "hf/tokenizer.model" not in both and "hf/tokenizer.json" in both and "hf/config.json" in both


def test_large_or_escaping_assets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(b"x" * 2001)
    monkeypatch.setattr("megatron_llm.hf.assets.MAX_BYTES", 2000)
    with pytest.raises(ValueError, match="tokenizer.json has 2001 bytes.*may have 2000"):
        collect_assets(tmp_path / "hf")
    for name in ("hf/../evil", "hf/", "hf/a/b", "hf/..", "hf//etc/passwd"):
        with pytest.raises(ValueError, match="not a plain file name"):
            exported_files({name: b""})


def test_output_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "hf")
    step, out = save_from_folder(tmp_path / "hf", tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    assert main(["export", str(step), str(out)]) == 0  # an empty folder is no obstacle
    first = stored_tensors(out)
    assert main(["export", str(step), str(out)]) == 1
    assert "is not empty; choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    (out / "old.txt").write_text("of an earlier export")
    assert main(["export", str(step), str(out), "--overwrite", "--dtype", "fp16"]) == 0
    assert not (out / "old.txt").exists()
    assert_same_tensors(stored_tensors(out), {name: tensor.half() for name, tensor in first.items()})
    (out / "mine").mkdir()
    assert main(["export", str(step), str(out), "--overwrite"]) == 1
    assert "holds the folder mine, so it is no earlier export" in capsys.readouterr().err
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    assert main(["export", str(step), str(home), "--overwrite"]) == 1
    assert (home / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "home", "out", "run"]


def test_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    stored = make_folder(tmp_path / "hf")
    model = ModelConfig(**HFFolder(tmp_path / "hf").model_fields())
    source = HFFolder(tmp_path / "hf").source(model)
    assets, out = collect_assets(tmp_path / "hf"), tmp_path / "out"
    export_hf(source, model, assets, out)
    tensors = {name: source.read(Part(name, shape, ()), Box.full(shape)) for name, shape in logical_tensors(model)}
    tensors["head.weight"][5, 5] = -7e4
    with pytest.raises(ValueError, match="lm_head.weight has values up to 70000, beyond float16's 65504"):
        export_hf(Values(tensors), model, assets, out, dtype="F16", overwrite=True)
    assert_same_tensors(stored_tensors(out), stored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    tensors["head.weight"][5, 5] = float("inf")  # not of our making: exported as it is
    export_hf(Values(tensors), model, assets, out, dtype="F16", overwrite=True)
    assert stored_tensors(out)["lm_head.weight"][5, 5] == float("inf")


def test_no_checkpoint_and_damaged_asset_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert "absent is not a folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no whole checkpoint in" in capsys.readouterr().err
    make_folder(tmp_path / "hf")
    step = save_from_folder(tmp_path / "hf", tmp_path / "run")
    asset = step / "assets" / "hf" / "config.json"
    asset.write_bytes(asset.read_bytes().replace(b"silu", b"gelu"))
    assert main(["export", str(step), str(tmp_path / "out")]) == 1
    assert f"{asset} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("1000", 1000), ("2 KB", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5GiB", "0"])
def test_wrong_sizes_are_usage_errors(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "a", "b", f"--shard-size={text}"])
    assert caught.value.code == 2 and "is not a size such as 5GB" in capsys.readouterr().err
