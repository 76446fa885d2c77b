"""A Hugging Face folder as the engine sees it: the model's fields, whether its files are whole, and its tensors by rectangle.

`training/resolve.py` asks for `model_fields` and `problems` before any process group exists, without torch; every rank
then reads just its rectangles through `HFSource`, so no conversion step and no copy of the whole model is needed.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_llm.config import ModelConfig, sentences
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.families import families, find_family
from megatron_llm.hf.family import Family, Piece, Rows, StoredTensor
from megatron_llm.hf.files import open_tensor_files
from megatron_llm.ops.tensor_file import TORCH_NAMES, TensorFile, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_llm.parallel.shard import Box, Part

_SHOWN = 5  # names listed in a message about many tensors


def architecture_of(config: dict[str, Any], where: str) -> Family:
    """The family that a config.json names; old ones lack `architectures`, and their `model_type` says it.

    Raises ValueError saying `where` if it names none or an unknown one.
    """
    architectures = config.get("architectures")
    if not architectures and config.get("model_type"):
        return family_of_type(str(config["model_type"]), where)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"{where}: `architectures` must name one architecture, got {architectures}")
    try:
        return find_family(str(architectures[0]))
    except ValueError as error:
        code = ", and its own code (auto_map) is never run" if config.get("auto_map") else ""
        raise ValueError(f"{where}: {error}{code}") from None


def family_of_type(model_type: str, where: str) -> Family:
    """The first family of a `model_type`. Raises ValueError saying `where` if there is none."""
    known = dict.fromkeys(families().values())
    for family in known:
        if family.model_type == model_type:
            return family
    types = ", ".join(sorted({family.model_type for family in known}))
    raise ValueError(f"{where} names no architecture, and model_type {model_type} is not supported; supported: {types}")


class HFFolder:
    """A folder with config.json and weights.

    Raises ValueError if there is no folder, no readable config.json, or an architecture that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "config.json"
        if not file.is_file():
            what = "has no config.json" if self.path.is_dir() else "is not a folder"
            way = f"from the hub: hf download OWNER/NAME --local-dir {self.path}"
            raise ValueError(f"{self.path} {what}; expected a Hugging Face model folder ({way})")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
        self.config: dict[str, Any] = config
        self.family = architecture_of(config, str(file))

    def model_fields(self) -> dict[str, Any]:
        """Fields of ModelConfig. Raises ValueError listing everything in config.json that is wrong or not supported."""
        try:
            fields = self.family.fields(self.config)
            ModelConfig(**fields)
        except ValidationError as error:
            raise ValueError(f"{self.path / 'config.json'}: {'; '.join(sentences(error))}") from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return fields

    def notes(self) -> list[str]:
        """What holds for training with this folder and may surprise, a sentence each."""
        return [f"{self.path}: {note}" for note in ConfigReader(self.config).notes()]

    @cached_property
    def _files(self) -> tuple[dict[str, TensorFile], list[str]]:
        return open_tensor_files(self.path)

    def problems(self, model: ModelConfig | None = None) -> list[str]:
        """What is wrong with the weights, a sentence each, from the files' headers alone; empty if nothing is.

        `model` is what the tensors must fit, by default what config.json says. Raises ValueError like `model_fields`.
        """
        model = model or ModelConfig(**self.model_fields())
        tensors, problems = self._files
        if problems:
            return list(problems)
        try:
            expected = {tensor.name: tensor.shape for tensor in self.family.stored_tensors(model, self.prefixed)}
        except ValueError as error:
            return [f"{self.path}: {error}"]
        missing = [name for name in expected if name not in tensors]
        if missing:
            problems = [f"{self.path} lacks {_listed(missing)} of a model with {model.num_hidden_layers} layers"]
        for name, file in tensors.items():
            info = file.infos[name]
            if name in expected and info.shape != expected[name]:
                problems.append(f"{file.path}: {name} has shape {info.shape}, the model needs {expected[name]}")
            if info.dtype not in TORCH_NAMES and not self.family.is_derived(name):
                problems.append(f"{file.path}: {name} is {info.dtype}; supported: {', '.join(TORCH_NAMES)}")
        tied = {self.family.hf_name("head.weight", self.prefixed)} if model.tie_word_embeddings else set()
        extra = [name for name in tensors if name not in expected and name not in tied and not self.family.is_derived(name)]
        if extra:
            problems.append(
                f"{self.path} holds {_listed(extra)} that {self.family.architecture} with "
                f"{model.num_hidden_layers} layers does not have; they would be lost"
            )
        return problems

    @property
    def prefixed(self) -> bool:
        """Whether names of tensors begin with the family's prefix."""
        return self.family.is_prefixed(self._files[0])

    def tensor_dtypes(self) -> dict[str, str]:
        """The folder's name of every stored weight -> safetensors' name of its dtype (BF16, ...)."""
        tensors, _ = self._files
        return {name: file.infos[name].dtype for name, file in tensors.items() if not self.family.is_derived(name)}

    def source(self, model: ModelConfig | None = None) -> HFSource:
        """The weights of `model`. Raises ValueError with all `problems`."""
        model = model or ModelConfig(**self.model_fields())
        problems = self.problems(model)
        if problems:
            raise ValueError("\n".join(problems))
        return HFSource(self.family, self._files[0], model, self.prefixed)


class HFSource:
    """The weights of a checked folder as a `TensorSource`; made by `HFFolder.source`."""

    def __init__(self, family: Family, tensors: dict[str, TensorFile], model: ModelConfig, prefixed: bool):
        self._tensors = tensors
        self._places: dict[str, list[tuple[StoredTensor, Piece]]] = {}
        for stored in family.stored_tensors(model, prefixed):
            for piece in stored.pieces:
                self._places.setdefault(piece.name, []).append((stored, piece))
        self._head = family.hf_name("head.weight", prefixed)

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of a logical tensor."""
        key = self._places[name][0][0].name
        return self._tensors[key].infos[key].dtype

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of `box` of `part.name`: a CPU tensor in the file's dtype; only these bytes are read.

        Raises ValueError if the folder lacks the tensor, has another shape, or claims to be tied and is not.
        """
        import torch

        places = self._places.get(part.name)
        if places is None:
            raise ValueError(f"the Hugging Face folder has no {part.name}")
        if places[0][1].shape != part.shape:
            raise ValueError(f"{part.name} has shape {part.shape} in the model, {places[0][1].shape} in {places[0][0].name}")
        wanted = [
            (stored, rows)
            for stored, piece in places
            for rows in (rows.within(box.offset[0], box.shape[0]) for rows in piece.rows)
            if rows.count
        ]
        if len(wanted) == 1:
            values = self._read_rows(*wanted[0], box)
        else:
            values = torch.empty(box.shape, dtype=torch_dtype(self.dtype(part.name)))
            for stored, rows in wanted:
                values[rows.logical - box.offset[0] :][: rows.count] = self._read_rows(stored, rows, box)
        if part.name == "embedding.weight" and "head.weight" not in self._places and self._head in self._tensors:
            self._check_tied(places[0][0].name, values, box)
        return values

    def _read_rows(self, stored: StoredTensor, rows: Rows, box: Box) -> Tensor:
        """Some rows of a stored tensor, in the columns of `box`, as the logical tensor has them."""
        file = self._tensors[stored.name]
        inner = box.slices[1:]
        if len(stored.shape) < len(box.shape):  # it is one row
            return file.read(stored.name, inner)[None]
        outputs = slice(rows.stored, rows.stored + rows.count)
        if stored.transposed:
            return file.read(stored.name, (*inner, outputs)).t()
        return file.read(stored.name, (outputs, *inner))

    def _check_tied(self, embedding: str, values: Tensor, box: Box) -> None:
        """A tied folder may store the head as well. It must be the same matrix: ours would drop a different one."""
        import torch

        file = self._tensors[self._head]
        if not torch.equal(file.read(self._head, box.slices), values):
            raise ValueError(
                f"{file.path}: {self._head} differs from {embedding}, but config.json says tie_word_embeddings; "
                "set it to false there to keep both matrices"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:_SHOWN])}{more})"
