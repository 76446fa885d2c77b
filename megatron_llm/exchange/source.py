"""The weights of a Megatron checkpoint as a `TensorSource`: asked for logical tensors, it reads the rows that hold them.

Where the checkpoint keeps the optimizer's float32 masters shaped like the weights (`optimizer.state.fp32_param.KEY`, written
with --dist-ckpt-optim-fully-reshardable), they are read instead of the rounded weights. Called by `imports.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_llm.config import ModelConfig
from megatron_llm.exchange.names import Matrix, Piece, Rows, matrices
from megatron_llm.exchange.torch_dist import ChunkedTensor, TorchDistFolder
from megatron_llm.ops.tensor_file import TORCH_NAMES
from megatron_llm.parallel.shard import Box, Part

if TYPE_CHECKING:
    from torch import Tensor

MASTERS = "optimizer.state.fp32_param."
EMBEDDING = "embedding.word_embeddings.weight"
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler|.*_extra_state")
_SHOWN = 5
_REASONS = (  # the first pattern that is found in a key says why a Llama does not have it
    (r"\bexperts\b|\brouter\b|shared_experts", "mixture of experts"),
    (r"\.bias$|layer_norm_bias$", "biases"),
    (r"q_layernorm|k_layernorm", "norms of queries and keys"),
    (r"linear_q_(down|up)_proj|linear_kv_(down|up)_proj|linear_q_proj", "multi-latent attention"),
    (r"^mtp\.", "multi-token prediction"),
    (r"position_embeddings", "learned positions"),
    (r"cross_attention|^encoder\.", "an encoder"),
    (r"adapter|lora", "adapters; merge them first"),
    (r"^output_layer\.weight$", "a head of its own, although the embedding is said to be tied"),
)


@dataclass(frozen=True)
class _Place:
    """Where a logical tensor is: the key, the index in its first dim (None: it has no such dim), the rows, the whole matrix."""

    piece: Piece
    key: str
    index: int | None
    rows: tuple[Rows, ...]
    matrix: Matrix | None  # to be read whole, since its pieces are interleaved


class MegatronSource:
    """The weights of `model` in a folder. Nothing is read yet but what is there is compared with what the model needs.

    Attributes:
        masters: whether the values are the optimizer's float32 masters.
        padding: rows of the embedding beyond the model's vocabulary.

    Raises ValueError with all that is missing, has another shape, or is there and has no place in a Llama.
    """

    def __init__(self, folder: TorchDistFolder, model: ModelConfig):
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._last: tuple[str, int | None, Tensor] | None = None
        problems: list[str] = []
        missing = []
        used = set()
        for matrix in matrices(model):
            places = self._find(matrix)
            if not places:
                missing.append(next(matrix.places())[0] + ("" if matrix.layer is None else f" (layer {matrix.layer})"))
            for place in places:
                self._places[place.piece.name] = place
                if place.key not in used or place.index is not None:
                    problems += self._shape_problems(matrix, place, model)
                used.add(place.key)
        if missing:
            problems.append(f"{folder.path} lacks {_listed(missing)} of a model with {model.num_hidden_layers} layers")
        problems += self._extra(used, model)
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        self.masters = all(self._has_master(key) for key in used)
        self._prefix = MASTERS if self.masters else ""
        self.padding = folder.tensors[EMBEDDING].shape[0] - model.vocab_size

    def _find(self, matrix: Matrix) -> list[_Place]:
        """The pieces of a matrix, each with the place that holds it; empty if the checkpoint has it under no name."""
        for key, index in matrix.places():
            if key in self._folder.tensors:
                whole = matrix if matrix.interleaved else None
                return [_Place(piece, key, index, piece.rows, whole) for piece in matrix.pieces]
            alone = [key + piece.alone for piece in matrix.pieces]
            if all(piece.alone and name in self._folder.tensors for piece, name in zip(matrix.pieces, alone, strict=True)):
                rows = [(Rows(0, 0, piece.shape[0]),) for piece in matrix.pieces]
                pairs = zip(matrix.pieces, alone, rows, strict=True)
                return [_Place(piece, name, index, row, None) for piece, name, row in pairs]
        return []

    def _shape_problems(self, matrix: Matrix, place: _Place, model: ModelConfig) -> list[str]:
        tensor = self._folder.tensors[place.key]
        shape = matrix.shape if place.key.endswith(matrix.names) else place.piece.shape
        expected = shape if place.index is None else (model.num_hidden_layers, *shape)
        fits = tensor.shape == expected
        if matrix.padded:
            fits = tensor.shape[1:] == expected[1:] and tensor.shape[:1] >= expected[:1]
            if not fits and tensor.shape[1:] == expected[1:]:
                return [
                    f"{place.key} has {tensor.shape[0]} rows, fewer than the vocabulary of {model.vocab_size}; see --vocab-size"
                ]
        problems = [] if fits else [f"{place.key} has shape {tensor.shape}, the model needs {expected}"]
        if tensor.dtype not in TORCH_NAMES:
            problems.append(f"{place.key} is {tensor.dtype}; supported: {', '.join(TORCH_NAMES)}")
        return [f"{self._folder.path}: {problem}" for problem in problems]

    def _extra(self, used: set[str], model: ModelConfig) -> list[str]:
        """What is there and would be lost, by reason."""
        by_reason: dict[str, list[str]] = {}
        for key in self._folder.tensors:
            if key in used or _NOT_WEIGHTS.match(key):
                continue
            unknown = f"nothing that a Llama with {model.num_hidden_layers} layers has"
            reason = next((reason for pattern, reason in _REASONS if re.search(pattern, key)), unknown)
            by_reason.setdefault(reason, []).append(key)
        return [
            f"{self._folder.path} holds {_listed(keys)}: {reason}. This engine has no place for it, and it would be lost"
            for reason, keys in by_reason.items()
        ]

    def _has_master(self, key: str) -> bool:
        master: ChunkedTensor | None = self._folder.tensors.get(MASTERS + key)
        return master is not None and master.dtype == "F32" and master.shape == self._folder.tensors[key].shape

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of a logical tensor."""
        return self._folder.tensors[self._prefix + self._places[name].key].dtype

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of `box` of the logical tensor `part.name`: a CPU tensor of `box.shape` in the checkpoint's dtype.

        Raises ValueError if the model has no such tensor or it has another shape, or a file is damaged.
        """
        import torch

        if part.name not in self._places:
            raise ValueError(f"the Megatron checkpoint {self._folder.path} has no {part.name}")
        place = self._places[part.name]
        if place.piece.shape != part.shape:
            raise ValueError(f"{part.name} has shape {part.shape} in the model, {place.piece.shape} in {self._folder.path}")
        pieces = []
        start, stop = box.offset[0], box.offset[0] + box.shape[0]
        for rows in place.rows:
            first, last = max(start, rows.logical), min(stop, rows.logical + rows.count)
            if first < last:
                offset = (first - rows.logical + rows.stored, *box.offset[1:])
                pieces.append(self._rows(place, Box(offset, (last - first, *box.shape[1:]))))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, place: _Place, box: Box) -> Tensor:
        """A rectangle of a matrix. One whose pieces are interleaved is read whole, and kept until the next one is."""
        key = self._prefix + place.key
        if place.matrix is None:
            return self._read(key, place.index, box)
        if self._last is None or self._last[:2] != (key, place.index):
            self._last = None  # before the next one is read
            self._last = (key, place.index, self._read(key, place.index, Box.full(place.matrix.shape)))
        return self._last[2][box.slices]

    def _read(self, key: str, index: int | None, box: Box) -> Tensor:
        if index is None:
            return self._folder.read(key, box)
        return self._folder.read(key, Box((index, *box.offset), (1, *box.shape)))[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
