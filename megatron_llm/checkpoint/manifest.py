"""`manifest.json`: what a checkpoint holds, and the proof that it is whole.

    {"format": "megatron_llm checkpoint", "version": 1, "versions": {"megatron_llm": ..., "torch": ...},
     "run_state": {...}, "config": {...}, "facts": {...},
     "tensors": {KIND: {NAME: {"shape", "dtype", "boxes": [{"offset", "shape", "file", "key"}]}}},
     "files": {FILE: {"bytes", "checksum"}}, "checksum": "xxh3_128", "manifest_checksum": ...}

KIND is weights, m, v or ema; NAME is a logical name; dtypes are safetensors' names; FILE is relative to the folder. The last
entry is the checksum of all others as compact JSON with sorted keys. `save.py` writes it, `load.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import xxhash

from megatron_llm.ops.safetensors import CHECKSUM, WrittenFile
from megatron_llm.ops.storage import Folder
from megatron_llm.parallel.shard import Box

MANIFEST = "manifest.json"
FORMAT = "megatron_llm checkpoint"
VERSION = 1


@dataclass(frozen=True)
class StoredBox:
    """A rectangle of a logical tensor, and the file and key that hold it."""

    box: Box
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor of one kind; its boxes tile `shape`. `dtype` is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[StoredBox, ...]


Tensors = dict[str, dict[str, StoredTensor]]
"""kind -> logical name -> tensor."""


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest, checked.

    `facts` are what is known of data and machine, to notice when they change; `checksum` that of all the rest, when it was read.
    """

    run_state: dict[str, Any]
    config: dict[str, Any]
    tensors: Tensors
    files: dict[str, WrittenFile]
    versions: dict[str, str]
    facts: dict[str, Any]
    checksum: str = ""


def untiled(shape: tuple[int, ...], boxes: Iterable[Box]) -> str | None:
    """What is wrong if `boxes` do not cover a tensor of `shape` exactly once; None if they do."""
    whole = Box.full(shape)
    ordered = sorted(boxes, key=lambda box: box.offset)
    for number, box in enumerate(ordered):
        if box.intersect(whole) != box and box.numel:
            return f"the box at {box.offset} of shape {box.shape} reaches out of the tensor's shape {shape}"
        for other in ordered[number + 1 :]:
            if shape and other.offset[0] >= box.offset[0] + box.shape[0]:
                break  # sorted by the first dim: no later box can touch this one
            if box.intersect(other):
                return f"the boxes at {box.offset} of shape {box.shape} and at {other.offset} of shape {other.shape} overlap"
    saved = sum(box.numel for box in ordered)
    return None if saved == whole.numel else f"{saved} of {whole.numel} elements were saved"


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Make `folder` a checkpoint: the manifest appears whole, after everything it names is on disk."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "versions": manifest.versions,
        "run_state": manifest.run_state,
        "config": manifest.config,
        "facts": manifest.facts,
        "tensors": {
            kind: {name: _tensor_to_json(tensor) for name, tensor in sorted(tensors.items())}
            for kind, tensors in manifest.tensors.items()
        },
        "files": {name: asdict(written) for name, written in manifest.files.items()},
        "checksum": CHECKSUM,
    }
    body = json.loads(json.dumps(body))  # what a reader will see: keys are strings there, so they sort as strings
    body["manifest_checksum"] = _checksum(body)
    folder.commit(MANIFEST, json.dumps(body, separators=(",", ":")).encode())


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a checkpoint. Raises ValueError naming the file if it is absent, damaged or of another version."""
    path = f"{folder}/{MANIFEST}"
    try:
        raw = folder.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        what = "has no manifest.json: it was not saved to the end" if folder.names() else "does not exist"
        raise ValueError(f"checkpoint {folder} {what}") from None
    try:
        body: dict[str, Any] = json.loads(raw)
        expected = body.pop("manifest_checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged ({len(raw)} bytes; {type(error).__name__}: {error})") from error
    if _checksum(body) != expected:
        raise ValueError(f"{path} is damaged: its checksum is {_checksum(body)}, it says {expected}")
    found = tuple(body.get(key) for key in ("format", "version", "checksum"))
    if found != (FORMAT, VERSION, CHECKSUM):
        raise ValueError(
            f"{path} is of format {found[0]!r}, version {found[1]}, checksum {found[2]}; "
            f"this package reads {FORMAT!r}, version {VERSION}, checksum {CHECKSUM}. It was written by {body.get('versions')}"
        )
    try:
        files = {name: WrittenFile(**entry) for name, entry in body["files"].items()}
        tensors = {
            kind: {name: _tensor_from_json(entry) for name, entry in tensors.items()} for kind, tensors in body["tensors"].items()
        }
        manifest = Manifest(body["run_state"], body["config"], tensors, files, body["versions"], body.get("facts", {}), expected)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{path}: file name {name!r} leads out of the checkpoint")
    return manifest


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = [{"offset": s.box.offset, "shape": s.box.shape, "file": s.file, "key": s.key} for s in tensor.boxes]
    return {"shape": tensor.shape, "dtype": tensor.dtype, "boxes": boxes}


def _tensor_from_json(entry: dict[str, Any]) -> StoredTensor:
    boxes = (StoredBox(Box(tuple(b["offset"]), tuple(b["shape"])), b["file"], b["key"]) for b in entry["boxes"])
    return StoredTensor(tuple(entry["shape"]), entry["dtype"], tuple(boxes))
