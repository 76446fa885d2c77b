"""Checkpoints written by several ranks, read back by rectangle; damage of every kind is named; failures reach all ranks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_llm.checkpoint import Checkpoint, Contents, TensorToSave, latest_checkpoint, open_checkpoint, save_checkpoint
from megatron_llm.checkpoint.manifest import Manifest, untiled, write_manifest
from megatron_llm.checkpoint.save import commit, write_rank_file
from megatron_llm.ops.safetensors import WrittenFile
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, ShardSpec, flat_boxes, pieces
from tests.ranks import RankFailure, run_ranks

ALONE = Axis("world")
SHAPES = {"matrix": (7, 5), "vector": (11,), "cube": (3, 4, 5)}
STATE = {"step": 12, "tokens": 10**15, "loss_scale": 0.1, "ranges": [[1, 2]], "per_source": {10: 1, 9: 2}}


def _values(kind: str, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, kind + name)))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64 if kind == "v" else torch.float32)


def _share(rank: int, world: int) -> list[TensorToSave]:
    """The flat slices that a rank owns, ends at odd places, as boxes."""
    items = []
    for kind in ("weights", "m", "v"):
        for name, shape in SHAPES.items():
            flat = _values(kind, name).reshape(-1)
            cuts = [0, *(max(1, flat.numel() * r // world - r) for r in range(1, world)), flat.numel()]
            lo, hi = cuts[rank], cuts[rank + 1]
            whole = Box.full(shape)
            for piece in pieces(ShardSpec((Part(name, shape, ((whole, whole),)),)), shape, lo, hi):
                items.append(TensorToSave(kind, name, shape, piece.box, piece.view(flat[lo:hi])))
    return items


def _assert_whole(checkpoint: Checkpoint) -> None:
    """Every tensor, and many rectangles of it, is what was saved."""
    generator = torch.Generator().manual_seed(1)
    assert sorted(checkpoint.kinds) == ["m", "v", "weights"]
    for kind in checkpoint.kinds:
        source = checkpoint.source(kind)
        assert {name: info.shape for name, info in checkpoint.tensors(kind).items()} == SHAPES
        for name, shape in SHAPES.items():
            values, part = _values(kind, name), Part(name, shape, ())
            assert torch.equal(source.read(part, Box.full(shape)), values)
            for _ in range(20):
                offset = tuple(int(torch.randint(0, n, (), generator=generator)) for n in shape)
                sizes = tuple(
                    int(torch.randint(1, n - o + 1, (), generator=generator)) for n, o in zip(shape, offset, strict=True)
                )
                box = Box(offset, sizes)
                read = source.read(part, box)
                assert read.dtype == values.dtype and torch.equal(read, values[box.slices])


def _save(folder: Path, items: list[TensorToSave] | None = None, assets: dict[str, bytes] | None = None) -> None:
    contents = Contents(STATE, {"a": 1}, {"hf/x.txt": b"\x00\xff"} if assets is None else assets, {"train": [1]})
    save_checkpoint(folder, _share(0, 1) if items is None else items, contents, ALONE)


def _save_on_ranks(folder: Path, fail: str = "") -> str | None:
    """One rank of a save; returns the error instead of raising it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = Axis("world", rank, size, tuple(range(size)), dist.group.WORLD)
    items = _share(rank, size)
    if fail == "tensor" and rank == 1:
        items.append(TensorToSave("weights", "bad", (2,), Box((0,), (2,)), torch.zeros(3)))
    if fail == "gap" and rank == 2:
        items.pop()
    config = {"unserializable": object()} if fail == "config" else {}
    try:
        save_checkpoint(folder, items, Contents(STATE, config, {"a": b"1"}), world)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_and_any_box_is_read(tmp_path: Path, world: int) -> None:
    folder = tmp_path / "step-00000012"
    assert run_ranks(world, _save_on_ranks, folder) == [None] * world
    assert sorted(path.name for path in folder.iterdir()) == ["assets", "manifest.json"] + [
        f"rank-0000{rank}.safetensors" for rank in range(world)
    ]
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    _assert_whole(checkpoint)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("tensor", "rank 1: ValueError: weights of bad: a tensor of shape (3,)"),
        ("gap", "rank 0: ValueError: v of cube: "),
        ("config", "rank 0: TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path, fail: str, message: str) -> None:
    errors = run_ranks(3, _save_on_ranks, tmp_path / "step-00000001", fail)
    for error in errors:
        assert error is not None and f"{tmp_path / 'step-00000001'} was not written: {message}" in error
    assert latest_checkpoint(tmp_path) is None
    assert run_ranks(3, _save_on_ranks, tmp_path / "step-00000001") == [None] * 3  # over what is left of it
    _assert_whole(open_checkpoint(tmp_path / "step-00000001"))


def test_rank_that_dies_does_not_hang_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="planted"):
        run_ranks(2, _die_in_save, tmp_path)
    assert latest_checkpoint(tmp_path) is None


def _die_in_save(folder: Path) -> None:
    if dist.get_rank() == 1:
        raise SystemExit("planted")
    _save_on_ranks(folder / "step-00000001")


def test_one_process_state_config_and_assets_come_back(tmp_path: Path) -> None:
    _save(tmp_path / "step-00000001")
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    checkpoint.verify()
    _assert_whole(checkpoint)
    assert checkpoint.run_state == json.loads(json.dumps(STATE)) and checkpoint.config == {"a": 1}
    assert checkpoint.facts == {"train": [1]}
    assert checkpoint.assets == {"hf/x.txt": b"\x00\xff"}
    assert checkpoint.versions["torch"] == torch.__version__
    stored = load_file(tmp_path / "step-00000001" / "rank-00000.safetensors")  # the library reads our files
    assert torch.equal(stored["m/matrix@0,0"], _values("m", "matrix"))


def test_ranks_without_tensors_write_no_file(tmp_path: Path) -> None:
    assert write_rank_file(LocalFolder(tmp_path), 0, []) is None
    empty = TensorToSave("weights", "a", (4,), Box((4,), (0,)), torch.zeros(0))
    assert write_rank_file(LocalFolder(tmp_path), 1, [empty]) is None
    assert list(tmp_path.iterdir()) == []
    commit(LocalFolder(tmp_path), [None, write_rank_file(LocalFolder(tmp_path), 1, _share(0, 1)), None], Contents({}, {}))
    _assert_whole(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([(0, 3, 4, "float32")], "m of x: 3 of 4 elements were saved"),
        ([(0, 3, 4, "float32"), (2, 2, 4, "float32")], "overlap"),
        ([(0, 4, 4, "float32"), (0, 4, 4, "float32")], "overlap"),
        ([(0, 5, 4, "float32")], "reaches out of the tensor's shape"),
        ([(0, 2, 4, "float32"), (2, 2, 5, "float32")], r"F32 \(4,\) on one rank, F32 \(5,\) in rank-00001"),
        ([(0, 2, 4, "float32"), (2, 2, 4, "bfloat16")], r"F32 \(4,\) on one rank, BF16 \(4,\) in rank-00001"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    tmp_path: Path, written: list[tuple[int, int, int, str]], message: str
) -> None:
    """`written` is (offset, size, size of the logical tensor, dtype) of each rank's box."""
    files = []
    for rank, (offset, size, whole, dtype) in enumerate(written):
        values = torch.zeros(size, dtype=getattr(torch, dtype))
        files.append(
            write_rank_file(LocalFolder(tmp_path), rank, [TensorToSave("m", "x", (whole,), Box((offset,), (size,)), values)])
        )
    with pytest.raises(ValueError, match=message):
        commit(LocalFolder(tmp_path), files, Contents({}, {}))
    assert not (tmp_path / "manifest.json").exists()


def test_file_that_rank_0_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_llm.checkpoint.save._SEEN_SECONDS", 0.0)
    file = write_rank_file(LocalFolder(tmp_path), 1, _share(0, 1))
    (tmp_path / "rank-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="rank 0 does not see it after 0 s; checkpoints need a folder that all nodes share"):
        commit(LocalFolder(tmp_path), [file], Contents({}, {}))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tiling_check_agrees_with_counting_elements(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    numel = torch.Size(shape).numel()
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=4))})
    boxes = [box for lo, hi in zip(cuts, cuts[1:], strict=False) for box in flat_boxes(lo, hi, shape)]
    change = data.draw(st.sampled_from(["none", "drop", "repeat", "grow", "move"]))
    victim = data.draw(st.sampled_from(boxes))
    dim = data.draw(st.integers(0, len(shape) - 1))
    step = tuple(int(d == dim) for d in range(len(shape)))
    if change in ("drop", "grow", "move"):
        boxes.remove(victim)
    if change == "repeat":
        boxes.append(victim)
    if change == "grow":
        boxes.append(Box(victim.offset, tuple(n + s for n, s in zip(victim.shape, step, strict=True))))
    if change == "move":
        boxes.append(victim.shifted(step))
    count = torch.zeros([n + 1 for n in shape], dtype=torch.int64)
    for box in boxes:
        count[box.slices] += 1
    inside = count[Box.full(shape).slices]
    exact = bool((inside == 1).all()) and int(count.sum()) == numel
    assert (untiled(shape, boxes) is None) == exact


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    _save(folder)
    file = folder / "rank-00000.safetensors"
    content = file.read_bytes()
    for position in (len(content) - 1, len(content) // 2, 9):  # one flipped bit in data or header
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(ValueError, match=f"{file} is damaged: its checksum is .*, the manifest says"):
            open_checkpoint(folder).verify()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{file} has {len(content) - 10} bytes, manifest.json says {len(content)}"):
        open_checkpoint(folder)
    file.unlink()
    (folder / "assets" / "hf" / "x.txt").unlink()
    with pytest.raises(ValueError, match="rank-00000.safetensors is missing") as caught:
        open_checkpoint(folder)
    assert "x.txt is missing (2 bytes" in str(caught.value)


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    _save(folder)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for keep in (0, 1, len(content) // 2, len(content) - 1):
        manifest.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=rf"{manifest} is truncated or damaged \({keep} bytes"):
            open_checkpoint(folder)
    manifest.write_bytes(content.replace(b'"tokens":1000', b'"tokens":2000'))
    with pytest.raises(ValueError, match=f"{manifest} is damaged: its checksum is"):
        open_checkpoint(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match="has no manifest.json: it was not saved to the end"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="absent does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_manifest_of_another_version_or_with_paths_outside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("megatron_llm.checkpoint.manifest.VERSION", 2)
        _save(tmp_path / "step-00000002")
    with pytest.raises(ValueError, match="version 2, .* this package reads .* version 1"):
        open_checkpoint(tmp_path / "step-00000002")
    write_manifest(LocalFolder(tmp_path), Manifest({}, {}, {}, {"../x": WrittenFile(1, "")}, {}, {}))
    with pytest.raises(ValueError, match="file name '../x' leads out of the checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="asset name '../x' leads out"):
        _save(tmp_path / "step-00000001", assets={"../x": b""})
    assert not (tmp_path / "step-00000001").exists()


def test_reading_what_was_not_saved_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "c", [item for item in _share(0, 1) if item.kind == "m"])
    checkpoint = open_checkpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="has no 'weights' tensors, only m"):
        checkpoint.source("weights")
    source = checkpoint.source("m")
    with pytest.raises(ValueError, match="m of other in .*: not in the checkpoint"):
        source.read(Part("other", (1,), ()), Box((0,), (1,)))
    with pytest.raises(ValueError, match=r"m of matrix in .* has shape \(7, 5\), the model needs \(8, 5\)"):
        source.read(Part("matrix", (8, 5), ()), Box((0, 0), (8, 5)))


def test_file_that_rank_0_sees_later_is_waited_for(tmp_path: Path) -> None:
    file = write_rank_file(LocalFolder(tmp_path), 1, _share(0, 1))
    path, hidden = tmp_path / "rank-00001.safetensors", tmp_path.parent / "hidden"
    path.rename(hidden)
    threading.Timer(0.3, lambda: hidden.rename(path)).start()
    commit(LocalFolder(tmp_path), [file], Contents({}, {}))
    _assert_whole(open_checkpoint(tmp_path))
