"""Which checkpoint is the newest whole one, after kills at any moment of a save, and which are deleted."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_llm.checkpoint import (
    Contents,
    TensorToSave,
    checkpoint_folder,
    find_checkpoint,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part


def _save(checkpoints: Path, step: int, value: float = 1.0) -> Path:
    folder = checkpoints / f"step-{step:08d}"
    assert str(checkpoint_folder(checkpoints, step)) == str(folder)
    items = [TensorToSave(kind, "x", (3,), Box((0,), (3,)), torch.full((3,), value)) for kind in ("weights", "m")]
    save_checkpoint(folder, items, Contents({"step": step}, {}, {"t": b"x"}), Axis("world"))
    return folder


def _latest(checkpoints: Path) -> str:
    found = latest_checkpoint(checkpoints)
    assert found is not None and str(found.folder.parent()) == str(checkpoints)
    return str(found.folder).rsplit("/", 1)[-1]


def _names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


class Killed(BaseException):
    """Stands for kill -9: no handler may catch it."""


@pytest.mark.parametrize("call", range(40))
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replacing"])
def test_killed_at_any_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, replaced: bool) -> None:
    """Die at the n-th call into the file system: the newest checkpoint is the old one or the new one, always whole."""
    _save(tmp_path, 1)
    if replaced:
        _save(tmp_path, 2)
    calls = 0

    def dying(function: object) -> object:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            return function(*args, **kwargs)  # type: ignore[operator]

        return wrapper

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace", "open", "write", "unlink", "rmdir", "makedirs"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            _save(tmp_path, 2, 2.0)
            done = True
        except Killed:
            done = False
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    checkpoint.verify()
    step = checkpoint.run_state["step"]
    value = checkpoint.source("weights").read(Part("x", (3,), ()), Box((1,), (2,)))
    if done:
        assert (step, value.tolist()) == (2, [2.0, 2.0])
    if step == 1:
        assert value.tolist() == [1.0, 1.0]
    assert call > 0 or not done  # the first call already kills
    assert call < 39 or done  # the last case lets everything through: the others died at every earlier call
    _save(tmp_path, 2, 3.0)  # what is left over is cleaned
    again = open_checkpoint(tmp_path / "step-00000002")
    again.verify()
    assert again.source("weights").read(Part("x", (3,), ()), Box((0,), (3,))).tolist() == [3.0] * 3
    assert _names(tmp_path / "step-00000002") == ["assets", "manifest.json", "rank-00000.safetensors"]


def test_latest_is_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10, 100000000):
        _save(tmp_path, step)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").write_text("step-00000099")
    assert _latest(tmp_path) == "step-100000000"
    (tmp_path / "step-100000000" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert _latest(tmp_path) == "step-00000010"
    assert not caplog.records  # an interrupted save is nothing to warn about
    manifest = tmp_path / "step-00000010" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert _latest(tmp_path) == "step-00000002"
    assert f"{manifest} is truncated or damaged (50 bytes" in caplog.text
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    assert latest_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in range(1, 8):
        _save(tmp_path, step)
    (tmp_path / "step-00000007" / "manifest.json").unlink()  # being written right now
    (tmp_path / "step-00000005" / "manifest.json").unlink()  # interrupted
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")  # damaged
    (tmp_path / "mine").mkdir()
    known: set[str] = set()
    prune_checkpoints(checkpoint_folder(tmp_path, 6), 2, known=known)
    assert _names(tmp_path) == ["mine", "step-00000003", "step-00000004", "step-00000006", "step-00000007"]
    assert known == {"step-00000004", "step-00000002", "step-00000001"}
    prune_checkpoints(checkpoint_folder(tmp_path, 6), 5)
    assert len(_names(tmp_path)) == 5


def test_pruning_keeps_every_so_many_steps_for_good(tmp_path: Path) -> None:
    for step in range(1, 9):
        _save(tmp_path, step)
        prune_checkpoints(checkpoint_folder(tmp_path, step), 2, keep_every=3)
    assert _names(tmp_path) == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_pruning_never_trades_the_newest_for_one_of_a_step_to_come(tmp_path: Path) -> None:
    """A damaged checkpoint that the run went back behind looks whole as long as nobody reads it."""
    for step in (200, 300):
        _save(tmp_path, step)
    _save(tmp_path, 237)
    prune_checkpoints(checkpoint_folder(tmp_path, 237), 1)
    assert _names(tmp_path) == ["step-00000237", "step-00000300"]


def test_a_folder_with_the_name_of_another_step_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (4, 5):
        _save(tmp_path, step)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000009")
    with caplog.at_level(logging.WARNING):
        assert _latest(tmp_path) == "step-00000004"
    assert "step-00000009 holds step 5: it was renamed or copied; give it the name of its step" in caplog.text
    prune_checkpoints(checkpoint_folder(tmp_path, 4), 1)
    assert _names(tmp_path) == ["step-00000004", "step-00000009"]


def test_one_that_cannot_be_deleted_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        _save(tmp_path, step)
    plain = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name == "step-00000003":
            raise PermissionError(1, "planted", str(path))
        plain(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    prune_checkpoints(checkpoint_folder(tmp_path, 5), 1)
    assert _names(tmp_path) == ["step-00000003", "step-00000005"]


def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    (folder / "rank-00000.safetensors").unlink()
    (folder / "rank-00000.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="rank-00000.safetensors is missing"):
        open_checkpoint(folder)


def test_find_checkpoint_understands_step_checkpoints_and_run_folders(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = _save(run / "checkpoints", 3)
    newest = _save(run / "checkpoints", 20)
    assert str(find_checkpoint(step).folder) == str(step)
    assert str(find_checkpoint(run / "checkpoints").folder) == str(newest)
    assert str(find_checkpoint(run).folder) == str(newest)
    (newest / "manifest.json").unlink()
    assert str(find_checkpoint(run).folder) == str(step)
    with pytest.raises(ValueError, match="step-00000020 has no manifest.json: it was not saved to the end"):
        find_checkpoint(newest)
    with pytest.raises(ValueError, match="absent is not a folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        find_checkpoint(tmp_path)
