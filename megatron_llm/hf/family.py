"""`Family`: everything the project knows about one Hugging Face architecture, as data.

A family is one file in `families/` that ends in `FAMILY = Family(...)`. The reader and the export derive names, shapes and
configs from it. Torch-free, so that a folder can be checked on a login node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_llm.config import ModelConfig


@dataclass(frozen=True)
class TensorName:
    """One logical tensor of a model: our name, the folder's name, and the shape of both."""

    logical: str
    hf: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: what config.json's `architectures` says.
        from_hf: config.json -> fields of ModelConfig. Raises ValueError listing everything that is not supported.
        patch: (config.json, model) -> a copy that describes `model`, every other field and the spelling untouched.
        to_hf: (model, safetensors' dtype name) -> config.json of a model that has none yet.
        tensors: (our name, the folder's name, dims) in the order of the forward pass. `{i}` stands for every layer, a
            letter of dims for a size: V vocabulary, H hidden, F feed-forward, Q all query heads, K all key heads.
        derived: patterns (regular expressions) of buffers in old folders that are computed, not trained; not imported.
    """

    architecture: str
    from_hf: Callable[[dict[str, Any]], dict[str, Any]]
    patch: Callable[[dict[str, Any], ModelConfig], dict[str, Any]]
    to_hf: Callable[[ModelConfig, str], dict[str, Any]]
    tensors: tuple[tuple[str, str, str], ...]
    derived: tuple[str, ...] = ()

    def tensor_names(self, model: ModelConfig) -> Iterator[TensorName]:
        """Every tensor of `model`; the head only when it is a matrix of its own."""
        sizes = {
            "V": model.vocab_size,
            "H": model.hidden_size,
            "F": model.intermediate_size,
            "Q": model.num_attention_heads * model.head_dim,
            "K": model.num_key_value_heads * model.head_dim,
        }

        def named(row: tuple[str, str, str], layer: int = 0) -> TensorName:
            logical, hf, dims = row
            return TensorName(logical.format(i=layer), hf.format(i=layer), tuple(sizes[dim] for dim in dims))

        per_layer = [row for row in self.tensors if "{i}" in row[0]]
        start = self.tensors.index(per_layer[0])
        yield from (named(row) for row in self.tensors[:start])
        yield from (named(row, layer) for layer in range(model.num_hidden_layers) for row in per_layer)
        for row in self.tensors[start + len(per_layer) :]:
            if row[0] != "head.weight" or not model.tie_word_embeddings:
                yield named(row)

    def hf_name(self, logical: str) -> str:
        """The folder's name of a tensor that exists once."""
        return next(hf for ours, hf, _ in self.tensors if ours == logical)
