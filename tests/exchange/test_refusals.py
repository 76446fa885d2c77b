"""What is not imported, and that each message names the file and the way out; nothing that a file says is executed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.cli.main import main
from megatron_llm.exchange.pickles import load_common
from tests.exchange import megatron
from tests.exchange.test_import import config_folder, import_
from tests.ranks import run_ranks

STACKED = "decoder.layers."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by megatron-core; tests change copies."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    run_ranks(1, megatron.save, str(folder))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "m"))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """The message of an import that fails and leaves nothing behind."""
    capsys.readouterr()
    output = folder.parent / "native"
    assert main(["import", "--from", "megatron", str(folder), str(output), *options]) == 1
    assert [path.name for path in folder.parent.iterdir() if "native" in path.name] == []
    return capsys.readouterr().err


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / "iter_0000007" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def rename(old: str, new: str) -> Callable[[Any], None]:
    """Store a copy of tensor `old` under the key `new` as well."""

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == old:
                metadata.storage_data[type(index)(new, index.offset)] = info

    return change


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"{STACKED}mlp.experts.experts.linear_fc1.weight", "mixture of experts"),
        (f"{STACKED}mlp.router.weight", "mixture of experts"),
        (f"{STACKED}self_attention.linear_qkv.bias", "biases"),
        (f"{STACKED}self_attention.q_layernorm.weight", "norms of queries and keys"),
        (f"{STACKED}self_attention.linear_kv_down_proj.weight", "multi-latent attention"),
        ("mtp.layers.0.eh_proj.weight", "multi-token prediction"),
        ("embedding.position_embeddings.weight", "learned positions"),
        (f"{STACKED}3.mlp.linear_fc2.weight", "nothing that a Llama with 3 layers has"),
    ],
)
def test_tensors_that_would_be_lost(copy: Path, capsys: pytest.CaptureFixture[str], key: str, reason: str) -> None:
    edit_metadata(copy, rename("decoder.final_layernorm.weight", key))
    said = refused(capsys, copy)
    assert f"{copy / 'iter_0000007'} holds {key}: {reason}" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 8), ("add_bias_linear", True), ("add_qkv_bias", True), ("swiglu", False), ("normalization", "LayerNorm"),
        ("rotary_percent", 0.5), ("rotary_interleaved", True), ("qk_layernorm", True), ("multi_latent_attention", True),
        ("position_embedding_type", "yarn"), ("apply_layernorm_1p", True), ("mtp_num_layers", 1), ("window_size", (127, 0)),
    ],
)  # fmt: skip
def test_arguments_of_what_is_no_llama(copy: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any) -> None:
    args = megatron.arguments(tied=False, **{name: value})
    torch.save({"args": args, "iteration": 7}, copy / "iter_0000007" / "common.pt")
    said = refused(capsys, copy)
    assert f"common.pt: the run's arguments do not describe a Llama: {name} {value!r} is not supported, only" in said


def test_moments_are_left_behind(copy: Path) -> None:
    for key in ("optimizer.state.exp_avg.output_layer.weight", "chained_0.optimizer.distributed.dp_group_idx_0.exp_avg"):
        edit_metadata(copy, rename("output_layer.weight", key))
    import_(copy, copy.parent / "native")


def test_shapes_and_a_head_that_should_not_be(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = copy / "iter_0000007" / "common.pt"
    torch.save({"args": megatron.arguments(tied=True, ffn_hidden_size=48, num_layers=4)}, common)
    said = refused(capsys, copy)
    assert "decoder.layers.mlp.linear_fc2.weight has shape (3, 24, 40), the model needs (4, 24, 48)" in said
    assert "holds output_layer.weight: a head of its own, although the embedding is said to be tied" in said
    torch.save({"args": megatron.arguments(tied=False, num_query_groups=3)}, common)
    assert "linear_qkv.weight has shape (3, 80, 24), the model needs (3, 96, 24)" in refused(capsys, copy)


def test_files_that_are_missing_or_truncated(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / "iter_0000007"
    shard = folder / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert f"{shard} is truncated: {len(content) - 100} bytes, .metadata needs {len(content)}; copy" in refused(capsys, copy)
    shard.write_bytes(bytes(len(content)))
    said = refused(capsys, copy)
    assert f"error: {shard}: " in said and "is damaged or no plain tensor" in said
    shard.unlink()
    assert f"{shard} is missing, but .metadata names it" in refused(capsys, copy)
    shard.write_bytes(content)
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    assert f"{folder / '.metadata'} is truncated or damaged ({len(metadata) // 2} bytes" in refused(capsys, copy)
    (folder / ".metadata").unlink()
    assert f"{folder / '.metadata'} is missing" in refused(capsys, copy)
    (folder / ".metadata").write_bytes(metadata)
    (folder / "common.pt").unlink()
    said = refused(capsys, copy)
    assert f"{folder / 'common.pt'} is missing, so the architecture is unknown" in said and "--config HF_DIR" in said
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "is in Megatron's format zarr; save it again with --ckpt-convert-format torch_dist" in refused(capsys, copy)
    (folder / "metadata.json").unlink()
    assert "the checkpoint was not saved to the end" in refused(capsys, copy)


def test_folders_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent is not a folder" in refused(capsys, tmp_path / "absent")
    other = tmp_path / "m"
    (other / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    assert "so it is no Megatron checkpoint; name one of iter_0000002" in refused(capsys, other)
    (other / "latest_checkpointed_iteration.txt").write_text("2")
    assert "is in Megatron's format torch (one file a rank)" in refused(capsys, other)
    (other / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert f"names 3, but {other / 'iter_0000003'} does not exist" in refused(capsys, other)
    (other / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "must hold the number of an iteration or `release`, got '../../etc'" in refused(capsys, other)


def test_no_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(1, megatron.save, str(tmp_path / "m"), with_args=False)
    said = refused(capsys, tmp_path / "m")
    assert (
        "common.pt holds no arguments of a run, so the architecture is unknown; give it as" in said and "--config HF_DIR" in said
    )


def test_pickles_are_not_executed(copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    file, common = copy / "iter_0000007" / ".metadata", copy / "iter_0000007" / "common.pt"
    good = file.read_bytes()
    edit_metadata(copy, lambda metadata: setattr(metadata, "planner_data", megatron.Evil(str(trace))))
    said = refused(capsys, copy)
    assert f"{file} asks for " in said and ".open, which is no part of a checkpoint's metadata; nothing was executed" in said
    assert not trace.exists()
    pickle.loads(file.read_bytes())  # the file is what it is meant to be: an ordinary reader falls for it
    assert trace.exists()
    trace.unlink()
    file.write_bytes(good)

    torch.save({"args": megatron.arguments(tied=False, note=megatron.Evil(str(trace)))}, common)
    said = refused(capsys, copy)
    assert f"{common} cannot be read: it needs " in said and ".open, which could run code" in said and "--config HF_DIR" in said
    assert not trace.exists()
    import_(copy, tmp_path / "way out", "--config", str(config_folder(tmp_path / "hf")))
    assert not trace.exists()

    shard = copy / "iter_0000007" / "__0_0.distcp"
    evil = megatron.as_bytes(megatron.Evil(str(trace)))
    edit_metadata(copy, lambda metadata: setattr(next(iter(metadata.storage_data.values())), "relative_path", "../../x"))
    edit_metadata(copy, lambda metadata: [setattr(info, "offset", 0) for info in metadata.storage_data.values()])
    edit_metadata(copy, lambda metadata: [setattr(info, "length", len(evil)) for info in metadata.storage_data.values()])
    for path in (shard, shard.with_name("__0_1.distcp")):
        path.write_bytes(evil)
    assert "is damaged or no plain tensor" in refused(capsys, copy, "--config", str(tmp_path / "hf"))
    assert not trace.exists()


def test_file_names_do_not_leave_the_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "outside").write_bytes((copy / "iter_0000007" / "__0_0.distcp").read_bytes())

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../outside"

    edit_metadata(copy, change)
    assert "file name '../outside' leads out of the checkpoint" in refused(capsys, copy)


def test_objects_of_megatron_are_skipped_and_the_arguments_read(tmp_path: Path) -> None:
    """Real arguments hold enums of megatron and paths; they become inert records, without megatron being imported."""
    run_ranks(1, _save_real_objects, str(tmp_path / "common.pt"))
    declared = torch.serialization.get_safe_globals()  # by megatron, where another test of this process has imported it
    torch.serialization.clear_safe_globals()
    try:
        args = load_common(tmp_path / "common.pt")["args"]
    finally:
        torch.serialization.add_safe_globals(declared)
    assert args.num_layers == 3 and args.params_dtype is torch.float32
    assert type(args.attention_backend).__name__ == "AttnBackend" and not isinstance(args.attention_backend, Enum)
    assert type(args.save).__name__ == "PosixPath" and args.save.args == ("/", "data")


def _save_real_objects(path: str) -> None:
    import numpy as np
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend

    args = megatron.arguments(
        tied=False, attention_backend=AttnBackend.auto, model_type=ModelType.encoder_or_decoder, save=Path("/data"),
        optimizer=OptimizerConfig(), seeds=np.arange(3),
    )  # fmt: skip
    torch.save({"args": args, "iteration": 7}, path)
