"""Loading: a checkpoint as a `TensorSource` that reads only the rectangles a rank asks for, whatever layout wrote them.

Called by `training/recovery.py` (resume), `training/resolve.py` (a new phase), `cli/export.py`, `cli/inspect.py` and
`cli/generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.manifest import MANIFEST, Manifest, StoredTensor, read_manifest
from megatron_llm.config import ModelConfig, PeftConfig
from megatron_llm.config.peft import LORA_A
from megatron_llm.models.lora import MergedWeights
from megatron_llm.ops.safetensors import SafetensorsFile, file_checksum
from megatron_llm.ops.storage import Folder, open_folder
from megatron_llm.ops.tensor_file import TensorInfo, torch_dtype
from megatron_llm.parallel.shard import Box, Part, TypedSource


class Checkpoint:
    """A checkpoint whose manifest is sound and whose files are there with the right sizes; made by `open_checkpoint`."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder = folder
        self._manifest = manifest
        self._open: dict[str, SafetensorsFile] = {}

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        return int(self.run_state["step"])

    @property
    def run_state(self) -> dict[str, Any]:
        return self._manifest.run_state

    @property
    def config(self) -> dict[str, Any]:
        """The settings it was trained with; of what another system has trained, those of the model only."""
        return self._manifest.config

    @property
    def checksum(self) -> str:
        """Of the manifest, and thereby of everything: what is the same in two checkpoints only if they are the same one."""
        return self._manifest.checksum

    @property
    def model(self) -> ModelConfig:
        """The architecture of the weights."""
        model = ModelConfig(**self.config["model"])
        if not model.max_position_embeddings and "training" in self.config:
            model = model.model_copy(update={"max_position_embeddings": self.config["training"]["sequence_length"]})
        return model

    @property
    def export_dtype(self) -> str:
        """safetensors' name of the dtype of the run's arithmetic, at most F32; of what another system has trained, as it is."""
        if "precision" in self.config:
            return {"bfloat16": "BF16", "float16": "F16"}.get(self.config["precision"].get("compute"), "F32")
        return next(iter(self._stored("weights").values())).dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What was known of the data it was trained on and of the arithmetic; empty if nothing was said."""
        return self._manifest.facts

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that wrote it."""
        return self._manifest.versions

    @property
    def kinds(self) -> list[str]:
        return list(self._manifest.tensors)

    @cached_property
    def assets(self) -> dict[str, bytes]:
        """Name -> content of the files that travel along. Raises ValueError if one is damaged."""
        names = [name for name in self._manifest.files if name.startswith("assets/")]
        if problems := self._damaged(names, None):
            raise ValueError("\n".join(problems))
        return {name.removeprefix("assets/"): self.folder.read_bytes(name) for name in names}

    def tensors(self, kind: str) -> dict[str, TensorInfo]:
        """Logical name -> dtype and shape of every tensor of a kind. Raises ValueError for a kind that was not saved."""
        return {name: TensorInfo(tensor.dtype, tensor.shape) for name, tensor in self._stored(kind).items()}

    def source(self, kind: str) -> TypedSource:
        """The weights of the model, or their average, by rectangle: adapters are merged into them.

        Raises ValueError for a kind that was not saved.
        """
        state = self.state(kind)
        adapted = [name.removesuffix(LORA_A) for name in self._stored(kind) if name.endswith(LORA_A)]
        if not adapted or kind not in ("weights", "ema"):
            return state
        return MergedWeights(state, adapted, PeftConfig(**self.config["peft"]))

    def state(self, kind: str) -> CheckpointSource:
        """The tensors of a kind as they were saved, for the run that goes on. Raises ValueError like `source`."""
        return CheckpointSource(self, kind, self._stored(kind))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(written.bytes for written in self._manifest.files.values())

    def damaged(self, rank: int = 0, ranks: int = 1, progress: Callable[[int], object] | None = None) -> list[str]:
        """A sentence for each file whose content is not what was written. What cannot be read raises OSError.

        Every byte is read once by one of `ranks` ranks, if all of them call this: in an unchanged layout by the one that
        is about to load it.
        """
        files = list(self._manifest.files)
        large = [name for name in files if not name.startswith("assets/")]
        mine = [name for number, name in enumerate(large) if number % ranks == rank]
        small = [name for name in files if name not in large] if rank == 0 else []
        return self._damaged(mine + small, progress)

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Read every byte and compare the checksums. Raises ValueError naming each damaged file."""
        if problems := self.damaged(progress=progress):
            raise ValueError("\n".join(problems))

    def _damaged(self, names: list[str], progress: Callable[[int], object] | None) -> list[str]:
        problems = []
        for name in names:
            path, expected = f"{self.folder}/{name}", self._manifest.files[name].checksum
            try:
                checksum = file_checksum(self.folder.open(name), progress)
            except (FileNotFoundError, ValueError) as error:
                problems.append(f"{path} has vanished or become shorter: {error}")
                continue
            if checksum != expected:
                problems.append(f"{path} is damaged: its checksum is {checksum}, the manifest says {expected}")
        return problems

    def _stored(self, kind: str) -> dict[str, StoredTensor]:
        if kind not in self._manifest.tensors:
            raise ValueError(f"checkpoint {self.folder} has no {kind!r} tensors, only {', '.join(self.kinds) or 'none'}")
        return self._manifest.tensors[kind]

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._open:
            self._open[name] = SafetensorsFile(self.folder.open(name))
        return self._open[name]


class CheckpointSource:
    """One kind of tensors of a checkpoint as a `TensorSource`."""

    def __init__(self, checkpoint: Checkpoint, kind: str, tensors: dict[str, StoredTensor]):
        self._checkpoint = checkpoint
        self._kind = kind
        self._tensors = tensors

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of a logical tensor."""
        return self._tensors[name].dtype

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of `box` of the logical tensor `part.name`, put together from the stored boxes that it touches.

        Raises ValueError naming the tensor if the checkpoint lacks it, has another shape, or does not cover the box.
        """
        where = f"{self._kind} of {part.name} in {self._checkpoint.folder}"
        if part.name not in self._tensors:
            raise ValueError(f"{where}: not in the checkpoint, which holds {len(self._tensors)} tensors of this kind")
        tensor = self._tensors[part.name]
        if tensor.shape != part.shape:
            raise ValueError(f"{where} has shape {tensor.shape}, the model needs {part.shape}")
        values: Tensor | None = None
        found = 0
        for stored in tensor.boxes:
            common = box.intersect(stored.box)
            if common is not None:
                read = self._checkpoint._file(stored.file).read(stored.key, common.relative_to(stored.box).slices)
                if common == box:
                    return read  # the usual case when the layout has not changed: no second copy
                if values is None:
                    values = torch.empty(box.shape, dtype=torch_dtype(tensor.dtype))
                values[common.relative_to(box).slices] = read
                found += common.numel
        if values is None or found != box.numel:
            raise ValueError(f"{where}: {found} of {box.numel} elements of the box at {box.offset} are stored")
        return values


def open_checkpoint(folder: str | Path | Folder) -> Checkpoint:
    """Open a step folder. Reads the manifest and looks at the files' sizes; `Checkpoint.verify` reads their content.

    Raises ValueError naming what is missing, truncated or damaged.
    """
    folder = open_folder(folder)
    manifest = read_manifest(folder)
    present = folder.files()
    problems = []
    for name, expected in manifest.files.items():
        path = f"{folder}/{name}"
        if name not in present:
            problems.append(f"{path} is missing ({expected.bytes} bytes according to {MANIFEST})")
        elif present[name] != expected.bytes:
            problems.append(f"{path} has {present[name]} bytes, {MANIFEST} says {expected.bytes}")
    named = {stored.file for tensors in manifest.tensors.values() for tensor in tensors.values() for stored in tensor.boxes}
    problems += [
        f"{folder}/{MANIFEST}: tensors are in {name}, which it does not list" for name in sorted(named - set(manifest.files))
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return Checkpoint(folder, manifest)
