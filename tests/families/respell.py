"""Rewrites a folder that transformers wrote into what is found on the hub: older keys and names, buffers, pickled files.

The cases of `gpt_like.py` give the results of `respelled` to `Case.respell`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def respelled(
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
    *,
    prefix: str = "",
    buffers: Callable[[int], Tensors] = lambda layer: {},
    head: tuple[str, str] | None = None,
    pickled: bool = False,
) -> Callable[[Path], None]:
    """A folder as others wrote it.

    Args:
        config: what becomes of config.json.
        prefix: is taken away from the names of tensors.
        buffers: computed tensors of a layer that older folders hold as well, without the prefix.
        head: names of the head and of the matrix that it is tied to, where the folder holds both.
        pickled: as pytorch_model.bin.
    """

    def respell(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(config(json.loads(file.read_text())), indent=2))
        tensors = load_file(folder / "model.safetensors")
        kept = "" if prefix else _body(tensors)
        for layer in {int(part) for name in tensors for part in name.split(".") if part.isdigit()}:
            tensors |= {kept + name: value for name, value in buffers(layer).items()}
        if head is not None:
            tensors[head[0]] = tensors[head[1]].clone()
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        (folder / "model.safetensors").unlink()
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return respell


def _body(tensors: Tensors) -> str:
    """What the names of layers begin with."""
    return next(name for name in tensors if ".0." in name).split(".")[0] + "."


def masks(layer: int, positions: int, attention: str, masked: bool = True) -> Tensors:
    """The causal mask and the value behind it that each layer of an old folder holds."""
    mask = torch.ones(positions, positions).tril().to(torch.uint8)[None, None]
    value = {f"{attention.format(layer)}.masked_bias": torch.tensor(-1e9)} if masked else {}
    return {f"{attention.format(layer)}.bias": mask, **value}


def old(
    *, drop: tuple[str, ...] = (), names: Mapping[str, str] = MappingProxyType({}), **extra: Any
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """config.json of transformers 4: rotary settings at the top, keys under other names, keys left out, keys nobody reads."""

    def config_of(config: dict[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in config.items() if key not in drop}
        rope = config.pop("rope_parameters", None)
        if rope is not None:
            kind = rope.pop("rope_type")
            top = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
            config |= top | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}
        spelling = {"dtype": "torch_dtype", **names}
        return {spelling.get(key, key): value for key, value in config.items()} | extra

    return config_of
