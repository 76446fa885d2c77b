"""Finds the weight files of a Hugging Face folder, in one piece or many, and checks them without reading tensors.

safetensors is the format. `pytorch_model.bin` of older folders is read too, through torch's restricted unpickler and a
memory map, so that no code in the file can run. Called by `hf/reader.py`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_llm.ops.safetensors import SafetensorsFile, TensorInfo, dtype_name
from megatron_llm.ops.storage import LocalFolder

if TYPE_CHECKING:
    from torch import Tensor, dtype


class TensorFile(Protocol):
    """A file whose tensors are known before they are read."""

    infos: dict[str, TensorInfo]

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """The values at `slices` of tensor `key`, as a contiguous CPU tensor of the caller's own."""
        ...


class TorchFile:
    """A `pytorch_model.bin` (zip format, torch >= 1.6). Raises ValueError if it is damaged or holds anything but tensors."""

    def __init__(self, path: Path):
        import torch

        self.path, self.name = str(path), path.name
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._tensors: dict[str, Tensor] = dict(tensors)
            self.infos = {key: TensorInfo(_name(value.dtype), tuple(value.shape)) for key, value in tensors.items()}
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError, pickle.UnpicklingError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is truncated or not a plain file of tensors ({reason})") from error

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        import torch

        return self._tensors[key][slices].clone(memory_format=torch.contiguous_format)


def _name(dtype: dtype) -> str:
    """safetensors' name of a dtype that weights may have, torch's of any other (which the reader will refuse)."""
    try:
        return dtype_name(dtype)
    except ValueError:
        return str(dtype)


def _open_safetensors(path: Path) -> SafetensorsFile:
    return SafetensorsFile(LocalFolder(path.parent).open(path.name))


_SINGLE: dict[str, Callable[[Path], TensorFile]] = {"model.safetensors": _open_safetensors, "pytorch_model.bin": TorchFile}


def open_tensor_files(folder: Path) -> tuple[dict[str, TensorFile], list[str]]:
    """Every tensor of a folder with the file that holds it, and what is wrong: truncated, missing, listed but absent.

    Like transformers, takes the first of model.safetensors, its index, pytorch_model.bin, its index.
    """
    for name, opener in _SINGLE.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files, problems = _open_all(folder, [name], opener)
            return {key: file for file in files for key in file.infos}, problems
        if index.is_file():
            return _open_indexed(index, opener)
    return {}, [f"{folder} has no weights: none of {', '.join(f'{name}, {name}.index.json' for name in _SINGLE)} is there"]


def _open_indexed(index: Path, opener: Callable[[Path], TensorFile]) -> tuple[dict[str, TensorFile], list[str]]:
    """The tensors of a folder whose files are listed in `index`."""
    try:
        weight_map = {str(key): str(name) for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{index} is damaged: {type(error).__name__}: {error}"]
    outside = sorted({name for name in weight_map.values() if Path(name).name != name})
    if outside:
        return {}, [f"{index} points out of its folder: {', '.join(outside)}"]
    files, problems = _open_all(index.parent, sorted(set(weight_map.values())), opener)
    found: dict[str, TensorFile] = {}
    for file in files:
        for key in file.infos:
            if key in found:
                problems.append(f"tensor {key} is both in {found[key].name} and in {file.name}")
            found[key] = file
    opened = {file.name: file for file in files}
    for key, name in weight_map.items():
        if name in opened and key not in opened[name].infos:
            problems.append(f"{index} says that {opened[name].path} holds {key}, but it does not")
    return found, problems


def _open_all(folder: Path, names: list[str], opener: Callable[[Path], TensorFile]) -> tuple[list[TensorFile], list[str]]:
    """The files that can be opened, and a sentence for each that cannot."""
    files: list[TensorFile] = []
    problems = []
    for name in names:
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing, but the index names it")
            continue
        try:
            files.append(opener(folder / name))
        except ValueError as error:
            problems.append(str(error))
    return files, problems
