"""Checkpoints somewhere else: runs on fsspec file systems, where nothing can be renamed and the manifest is one request."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from megatron_llm.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.parallel.shard import Box, Part
from tests.launch import launch
from tests.runs import TINY
from tests.training.commands import write_config

STEPS = 6


class NoRename(LocalFileSystem):
    """Local files as an object store shows them: no renames, and a file is there when its upload is complete."""

    protocol = "norename"
    written: list[str] = []

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store cannot rename")

    mv_file = rename = move = mv

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.written.append(Path(path).name)
        super().pipe_file(path, value)

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        if "w" in mode:
            self.written.append(Path(path).name)
        return super()._open(path, mode, **how)


fsspec.register_implementation("norename", NoRename, clobber=True)


def raw_config(run: Path, place: str | None, **checkpoint: Any) -> dict[str, Any]:
    raw = copy.deepcopy(TINY)
    raw["model"] |= {"num_hidden_layers": 2}
    raw["training"] |= {"steps": STEPS, "micro_batch_size": 1}
    raw["precision"] = {"compute": "float32"}
    raw["checkpoint"] = {"every_steps": 2, "keep_last": 2, "path": place, **checkpoint}
    return raw | {"logging": {"run_dir": str(run)}, "lr_schedule": {"kind": "constant"}}


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}": checkpoint.source(kind).read(Part(name, info.shape, ()), Box.full(info.shape))
        for kind in checkpoint.kinds
        for name, info in checkpoint.tensors(kind).items()
    }


def train(world: int, config: Path, *overrides: str) -> None:
    endings = launch(world, main, ["train", str(config), *overrides])
    assert [ending.code for ending in endings] == [0] * world, [ending.log for ending in endings]


@pytest.mark.parametrize("protocol", ["file", "norename"])  # file:// is a local folder
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_goes_on_from_a_remote_folder_as_from_a_local_one(tmp_path: Path, protocol: str, asynchronous: bool) -> None:
    place = f"{protocol}://{tmp_path}/bucket/run"
    local = write_config(tmp_path / "local.yaml", raw_config(tmp_path / "local", None))
    remote = write_config(tmp_path / "remote.yaml", raw_config(tmp_path / "remote", place, asynchronous=asynchronous))
    train(2, local)
    train(2, remote, "training.steps=4")
    train(2, remote)
    assert not (tmp_path / "remote/checkpoints").exists()
    names = sorted(path.name for path in (tmp_path / "bucket/run").iterdir())
    assert names == ["step-00000004", "step-00000006"], "older ones are deleted"
    found, expected = find_checkpoint(place), find_checkpoint(tmp_path / "local")
    found.verify()
    shown = place.removeprefix("file://")
    assert found.step == STEPS and str(find_checkpoint(tmp_path / "remote").folder) == f"{shown}/step-00000006"
    actual = state_of(found)
    assert [name for name, value in state_of(expected).items() if not torch.equal(actual[name], value)] == []


def test_the_manifest_is_written_last_and_in_one_piece(tmp_path: Path) -> None:
    NoRename.written.clear()
    config = write_config(tmp_path / "run.yaml", raw_config(tmp_path / "run", f"norename://{tmp_path}/run"))
    assert main(["train", str(config), "training.steps=1"]) == 0
    assert NoRename.written[-1] == "manifest.json" and "rank-00000.safetensors" in NoRename.written[:-1]


def test_an_object_store_in_memory_serves_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"memory://{tmp_path.name}/run"
    config = write_config(tmp_path / "run.yaml", raw_config(tmp_path / "run", place))
    assert main(["train", str(config), "training.steps=3"]) == 0
    assert main(["train", str(config)]) == 0
    for target in (place, f"{place}/step-00000006", str(tmp_path / "run")):
        assert main(["inspect", target, "--verify"]) == 0
        out = capsys.readouterr().out
        assert f"{place}/step-00000006" in out and "verified: every file has the checksum" in out
    assert main(["export", f"{place}/step-00000006", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf/model.safetensors").is_file()
    fs = fsspec.filesystem("memory")
    file = f"/{tmp_path.name}/run/step-00000006/rank-00000.safetensors"
    content = bytearray(fs.cat_file(file))
    content[-5] ^= 1
    fs.pipe_file(file, bytes(content))
    assert main(["inspect", place, "--verify"]) == 1
    assert f"{place}/step-00000006/rank-00000.safetensors is damaged" in capsys.readouterr().err
    assert main(["train", str(config), "training.steps=7"]) == 0
    text = capsys.readouterr().err
    assert "step-00000006/rank-00000.safetensors is damaged" in text and "going on from" in text
    assert open_checkpoint(f"{place}/step-00000006").step == 6, "taken again, and replaced"
    assert main(["train", str(config), "checkpoint.resume=never", "training.steps=1"]) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


def test_places_that_cannot_be_used_are_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, said in (("nowhere://x", "Protocol not known"), ("s3://bucket/run", "needs a package that is not installed")):
        assert main(["train", str(write_config(tmp_path / "run.yaml", raw_config(tmp_path / "run", place)))]) == 1
        text = capsys.readouterr().err
        assert place in text and said in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
