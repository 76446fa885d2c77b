"""Ranks read from a folder what they hold and nothing else: every byte is counted where files are read.

The layouts cut matrices along rows and columns, copy key heads, and cut flat slices for data parallelism; the folders are
safetensors and .bin, in one file and in several, with matrices as they are, fused, and transposed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_llm.config import ModelConfig
from megatron_llm.hf import HFFolder
from megatron_llm.hf.export import load_tensor
from megatron_llm.hf.families import find_family
from megatron_llm.hf.family import Family, Row, gate_then_up, grouped_qkv
from megatron_llm.ops import storage
from megatron_llm.parallel import shard
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import pieces
from megatron_llm.training.build import build_engine
from tests.ranks import run_ranks
from tests.runs import config_of

MODEL = {
    "vocab_size": 2003, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 12,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = find_family("LlamaForCausalLM")
FUSED: Family = dataclasses.replace(
    LLAMA,
    table=tuple(
        Row("model.layers.{i}.qkv.{kind}", "layers.{i}.attention.{part}.{kind}", grouped_qkv, transposed=True)
        if ".q_proj." in row.hf
        else Row("model.layers.{i}.gate_up.{kind}", "layers.{i}.mlp.{part}.{kind}", gate_then_up)
        if ".gate_proj." in row.hf
        else dataclasses.replace(row, transposed="down_proj" in row.hf or "o_proj" in row.hf)
        for row in LLAMA.table
        if not any(name in row.hf for name in (".k_proj.", ".v_proj.", ".up_proj."))
    ),
)
FAMILIES = {"as it is": LLAMA, "fused and transposed": FUSED}


class Numbered:
    """A source whose elements are all different, so that no rectangle is like another."""

    def read(self, part: shard.Part, box: shard.Box) -> torch.Tensor:
        whole = torch.arange(shard.Box.full(part.shape).numel, dtype=torch.float32).view(part.shape)
        return whole[box.slices] + sum(part.name.encode())


def write_folder(path: Path, family: Family, form: str) -> None:
    path.mkdir()
    model = ModelConfig(**MODEL)
    (path / "config.json").write_text(json.dumps(LLAMA.config(model)))
    tensors = {stored.name: load_tensor(Numbered(), stored, "F32") for stored in family.stored_tensors(model)}
    if form == "safetensors":
        save_file(tensors, path / "model.safetensors")
        return
    half = len(tensors) // 2
    files = {f"pytorch_model-{n}.bin": list(tensors.items())[n * half :][: half if n == 0 else None] for n in (0, 1)}
    for name, items in files.items():
        torch.save(dict(items), path / name, _use_new_zipfile_serialization=form == "zip")
    weight_map = {key: name for name, items in files.items() for key, _ in items}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load_and_count(path: str, family: str, parallel: dict[str, Any]) -> tuple[int, int]:
    """On a rank: (bytes read, bytes of the weights that it holds), when the engine has been built and holds the right values."""
    read = 0
    plain = storage._LocalFile.read

    def counting(file: storage._LocalFile, start: int, into: memoryview) -> None:
        nonlocal read
        read += len(into)
        plain(file, start, into)

    storage._LocalFile.read = counting  # type: ignore[method-assign]
    slab, shard._SLAB_ELEMENTS = shard._SLAB_ELEMENTS, 5000
    try:
        folder = HFFolder(path)
        folder.family = FAMILIES[family]
        config = config_of(
            model=folder.model_fields(), parallel=parallel,
            training={"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 4},
        )  # fmt: skip
        grid = Grid.build(config.parallel, config.model.num_key_value_heads)
        engine = build_engine(config, grid, torch.device("cpu"), folder.source())
    finally:
        storage._LocalFile.read, shard._SLAB_ELEMENTS = plain, slab  # type: ignore[method-assign]
    held = 0
    for stage in engine.stages.values():
        for parameter in stage.parameters():
            for piece in pieces(parameter.shard, tuple(parameter.shape)):  # type: ignore[attr-defined]
                assert torch.equal(piece.view(parameter.data.view(-1)), Numbered().read(piece.part, piece.box)), piece.part.name
                held += piece.box.numel * 4
    return read, held


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["safetensors", "zip", "before 1.6"])
def test_ranks_read_what_they_hold(tmp_path: Path, family: str, form: str) -> None:
    write_folder(tmp_path / "hf", FAMILIES[family], form)
    for parallel in (
        {"tensor_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
        {"tensor_parallel": 4},
        {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"},
    ):
        world = parallel.get("tensor_parallel", 1) * parallel.get("pipeline_parallel", 1)
        counts = run_ranks(world, load_and_count, str(tmp_path / "hf"), family, parallel)
        read, held = (sum(numbers) for numbers in zip(*counts, strict=True))
        assert held <= read <= 1.05 * held, (parallel, counts)


@pytest.mark.parametrize("zero_stage", [1, 0])
def test_data_parallel_ranks_share_the_reading(tmp_path: Path, zero_stage: int) -> None:
    """Each reads its ZeRO slice, and the weights are gathered; with stage 0 every one reads all that it holds."""
    write_folder(tmp_path / "hf", FUSED, "safetensors")
    parallel = {"tensor_parallel": 2, "zero_stage": zero_stage}
    counts = run_ranks(4, load_and_count, str(tmp_path / "hf"), "fused and transposed", parallel)
    read, held = (sum(numbers) for numbers in zip(*counts, strict=True))
    copies = 2 if zero_stage else 1
    assert held <= read * copies <= 1.05 * held, counts
