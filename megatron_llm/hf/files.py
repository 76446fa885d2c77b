"""Finds the weight files of a Hugging Face folder, in one piece or many, and checks them without reading tensors.

safetensors is the format. `pytorch_model.bin` of older folders is read too; no code in it can run. Called by `hf/reader.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_llm.ops.safetensors import SafetensorsFile
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.ops.tensor_file import TensorFile
from megatron_llm.ops.torch_file import TorchFile


def _open_safetensors(path: Path) -> TensorFile:
    return SafetensorsFile(LocalFolder(path.parent).open(path.name))


def _open_torch(path: Path) -> TensorFile:
    return TorchFile(LocalFolder(path.parent).open(path.name))


_GIT_LFS = b"version https://git-lfs."
_SINGLE: dict[str, Callable[[Path], TensorFile]] = {"model.safetensors": _open_safetensors, "pytorch_model.bin": _open_torch}


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


def open_adapter_file(folder: Path) -> tuple[dict[str, TensorFile], list[str]]:
    """The same of a folder that PEFT wrote: always one file."""
    openers = {"adapter_model.safetensors": _open_safetensors, "adapter_model.bin": _open_torch}
    for name, opener in openers.items():
        if (folder / name).is_file():
            files, problems = _open_all(folder, [name], opener)
            return {key: file for file in files for key in file.infos}, problems
    return {}, [f"{folder} has no weights: neither {' nor '.join(openers)} is there"]


def _open_indexed(index: Path, opener: Callable[[Path], TensorFile]) -> tuple[dict[str, TensorFile], list[str]]:
    """The tensors of a folder whose files are listed in `index`."""
    try:
        weight_map = {str(key): str(name) for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        if (pointer := _pointer(folder / name)) is not None:
            problems.append(pointer)
            continue
        try:
            files.append(opener(folder / name))
        except ValueError as error:
            problems.append(str(error))
    return files, problems


def _pointer(file: Path) -> str | None:
    """What is wrong if a repository was cloned without its large files."""
    with file.open("rb") as opened:
        found = opened.read(len(_GIT_LFS)) == _GIT_LFS
    return f"{file} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`" if found else None
