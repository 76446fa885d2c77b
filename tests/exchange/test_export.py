"""Exported checkpoints, loaded by megatron-core itself into its own GPTModel in several layouts, every key compared."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint import open_checkpoint
from megatron_llm.cli.main import main
from tests.exchange import megatron
from tests.exchange.test_import import import_, tensors_of
from tests.hf.folders import LLAMA3, assert_same_tensors, make_folder, make_tokenizer, stored_tensors
from tests.ranks import run_ranks

# Empty states that layers of Transformer Engine look for and megatron-core's own do not have.
FUSED_ONLY = {"decoder.layers.self_attention.core_attention._extra_state", "decoder.final_layernorm._extra_state"}


def export(checkpoint: Path, output: Path, *options: str) -> Path:
    """Run the command; returns the folder of the iteration."""
    assert main(["export", "--to", "megatron", str(checkpoint), str(output), *options]) == 0
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "0"
    return output / "iter_0000000"


def whole(parts: list[dict[str, torch.Tensor]], name: str, sharded: int | None) -> torch.Tensor:
    return parts[0][name] if sharded is None else torch.cat([part[name] for part in parts], dim=sharded)


@pytest.mark.parametrize(
    ("ranks", "layout", "tied", "dtype"),
    [
        (1, {"vocab": 128}, False, torch.float32),
        (1, {"vocab": 128}, True, torch.bfloat16),
        (2, {"tp": 2, "vocab": 256}, False, torch.bfloat16),  # Megatron pads to a multiple of 128 times tp
        (2, {"pp": 2, "vocab": 128, "layers": 4}, True, torch.float32),
    ],
    ids=["whole", "tied", "tp2", "pp2 tied"],
)
def test_megatron_core_loads_every_bit(
    tmp_path: Path, ranks: int, layout: dict[str, int], tied: bool, dtype: torch.dtype
) -> None:
    layers = layout.get("layers", 3)
    run_ranks(1, megatron.save, str(tmp_path / "m"), tied=tied, dtype=dtype, layers=layers)
    tensors = import_(tmp_path / "m", tmp_path / "native")
    folder = export(tmp_path / "native", tmp_path / "out")
    loaded = run_ranks(ranks, megatron.load_exported, str(folder), tied, dtype, **layout)
    for _, lacking, unwanted, _ in loaded:
        assert (lacking, unwanted) == (set(), FUSED_ONLY)

    parts = [part for part, _, _, _ in loaded]
    if layout.get("pp") == 2:  # the last stage numbers its layers from 0, and holds the tied embedding as its head
        first = loaded[1][3]
        assert first == 2
        names = {
            name.replace(f"layers.{i}.", f"layers.{i + first}."): name for i in (0, 1) for name in parts[1] if f".{i}." in name
        }
        assert torch.equal(parts[1]["output_layer.weight"], parts[0]["embedding.word_embeddings.weight"])
        parts = [{**parts[0], "decoder.final_layernorm.weight": parts[1]["decoder.final_layernorm.weight"]}
                 | {name: parts[1][old] for name, old in names.items()}]  # fmt: skip
    assert_same_tensors(by_hand(parts, layers, tied, layout.get("tp", 1)), tensors)


def by_hand(parts: list[dict[str, torch.Tensor]], layers: int, tied: bool, tp: int) -> dict[str, torch.Tensor]:
    """A GPTModel's parameters under our names: two groups of three query heads, one key and one value head of 8 rows each."""
    cut = {"linear_qkv": 0, "linear_proj": 1, "linear_fc2": 1, "word_embeddings": 0, "output_layer": 0}

    def get(name: str) -> torch.Tensor:
        return whole(parts, name, next((dim for module, dim in cut.items() if module in name), None) if tp > 1 else None)

    found = {"embedding.weight": get("embedding.word_embeddings.weight")[: megatron.VOCAB]}
    found["final_norm.weight"] = get("decoder.final_layernorm.weight")
    if not tied:
        found["head.weight"] = get("output_layer.weight")[: megatron.VOCAB]
        assert not get("output_layer.weight")[megatron.VOCAB : 128].any()
    for layer in range(layers):
        theirs, ours = f"decoder.layers.{layer}.", f"layers.{layer}."
        qkv = get(f"{theirs}self_attention.linear_qkv.weight").view(2, 5, 8, 24)
        halves = [part[f"{theirs}mlp.linear_fc1.weight"].chunk(2) for part in parts]  # each rank: its gate, then its up
        found |= {
            f"{ours}attention.q.weight": qkv[:, :3].reshape(48, 24),
            f"{ours}attention.k.weight": qkv[:, 3].reshape(16, 24),
            f"{ours}attention.v.weight": qkv[:, 4].reshape(16, 24),
            f"{ours}attention.o.weight": get(f"{theirs}self_attention.linear_proj.weight"),
            f"{ours}mlp.gate.weight": torch.cat([gate for gate, _ in halves]),
            f"{ours}mlp.up.weight": torch.cat([up for _, up in halves]),
            f"{ours}mlp.down.weight": get(f"{theirs}mlp.linear_fc2.weight"),
            f"{ours}attention_norm.weight": get(f"{theirs}input_layernorm.weight"),
            f"{ours}mlp_norm.weight": get(f"{theirs}pre_mlp_layernorm.weight"),
        }
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", [{}, {"use_rope_scaling": True}, {"rotary_seq_len_interpolation_factor": 3}], ids=str)
def test_import_export_import_is_bitwise(tmp_path: Path, tied: bool, rope: dict[str, Any]) -> None:
    run_ranks(1, megatron.save, str(tmp_path / "m"), tied=tied, dtype=torch.bfloat16, args=rope)
    first = import_(tmp_path / "m", tmp_path / "a")
    export(tmp_path / "a", tmp_path / "out", "--shard-size", "10KB", "--make-vocab-size-divisible-by", "16")
    assert len(list((tmp_path / "out" / "iter_0000000").glob("*.distcp"))) > 2
    assert_same_tensors(import_(tmp_path / "out", tmp_path / "b"), first)
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    assert a.model == b.model and a.config == b.config
    (common,) = run_ranks(1, megatron.common, str(tmp_path / "out" / "iter_0000000"))
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    args, given = common["args"], megatron.arguments(tied, **rope)
    assert isinstance(args, Namespace) and args.padded_vocab_size == 80
    for name in vars(given).keys() - {"padded_vocab_size", "tensor_model_parallel_size", "attention_dropout", "params_dtype"}:
        assert getattr(args, name) == getattr(given, name), name


def test_a_hugging_face_model_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its tokenizer, in the folder's dtype or another; what Megatron's arguments cannot say is refused."""
    stored = make_folder(tmp_path / "hf", torch.bfloat16, tied=True)
    make_tokenizer(tmp_path / "tokenizer")
    import_(tmp_path / "hf", tmp_path / "native", "--tokenizer", str(tmp_path / "tokenizer"), origin="hf")
    export(tmp_path / "native", tmp_path / "out")
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == (tmp_path / "tokenizer/tokenizer.json").read_bytes()
    back = import_(tmp_path / "out", tmp_path / "back", "--config", str(tmp_path / "hf"))
    assert_same_tensors(back, tensors_of(tmp_path / "native"))
    assert main(["export", str(tmp_path / "back"), str(tmp_path / "hf2")]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "hf2"), stored)

    assert main(["export", "--to", "megatron", str(tmp_path / "native"), str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err
    export(tmp_path / "native", tmp_path / "out", "--overwrite", "--dtype", "fp32")
    wide = import_(tmp_path / "out", tmp_path / "wide")
    assert_same_tensors(wide, {name: tensor.float() for name, tensor in back.items()})
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(["export", "--to", "megatron", str(tmp_path / "native"), str(tmp_path / "out"), "--overwrite"]) == 1
    assert "holds notes.txt, so it is no earlier export" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "x"), "--make-vocab-size-divisible-by", "8"]) == 1
    assert "belongs to --to megatron" in capsys.readouterr().err

    make_folder(tmp_path / "scaled", rope=LLAMA3)
    import_(tmp_path / "scaled", tmp_path / "native2", origin="hf")
    assert main(["export", "--to", "megatron", str(tmp_path / "native2"), str(tmp_path / "no")]) == 1
    assert (
        "original_max_position_embeddings 64; Megatron knows only original_max_position_embeddings 8192"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()


def test_a_run_exports_to_both_alike(tmp_path: Path) -> None:
    """Float32 masters rounded to the run's bfloat16; the context is that of its rows."""
    (tmp_path / "run.yaml").write_text(
        "model: {vocab_size: 70, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 4}\n"
        "data: {kind: synthetic}\nprecision: {compute: bfloat16}\n"
        "training: {sequence_length: 16, global_batch_size: 2, steps: 1}\n"
        "optimizer: {lr: 1.0e-3, ema_decay: 0.5}\n"
        f"logging: {{run_dir: {tmp_path / 'run'}}}\n"
    )
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    for options in ((), ("--ema",)):
        export(tmp_path / "run", tmp_path / "megatron", "--overwrite", *options)
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--overwrite", *options]) == 0
        ours = import_(tmp_path / "megatron", tmp_path / "a", "--overwrite")
        theirs = import_(tmp_path / "hf", tmp_path / "b", "--overwrite", origin="hf")
        assert_same_tensors(ours, theirs)
        assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
        a, b = (open_checkpoint(tmp_path / name).model for name in "ab")
        assert a == b and a.max_position_embeddings == 16
