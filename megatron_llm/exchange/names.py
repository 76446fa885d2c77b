"""Which rows of which Megatron tensor are which logical tensor: the one table that import and export both follow.

Keys are those of megatron-core's GPTModel. All layers together may be one tensor (`decoder.layers.X`, first dim: the layer)
or each its own (`decoder.layers.3.X`). The norm in front of a projection is named as a part of the projection, as Transformer
Engine fuses them; megatron-core's own layers are saved under the same names. Fused matrices:

    linear_qkv   per group of query heads that share a key head: the rows of its query heads, its key head, its value head
    linear_fc1   all rows of gate, then all of up

Query and key rows are in the half-rotation order that our RoPE uses too. Called by `source.py` and `export.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llm.config import ModelConfig

LAYERS = "decoder.layers."
EXTRA_STATE = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that keep an `_extra_state` (scales of fp8, empty otherwise) and want to find one."""


@dataclass(frozen=True)
class Rows:
    """`count` rows: from `logical` on in the logical tensor, from `stored` on in Megatron's."""

    logical: int
    stored: int
    count: int


@dataclass(frozen=True)
class Piece:
    """A logical tensor inside a matrix.

    Attributes:
        name, shape: of the logical tensor.
        rows: where its rows are.
        alone: what follows the matrix's key where the piece is a tensor of its own; empty if it never is.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    alone: str = ""


@dataclass(frozen=True)
class Matrix:
    """A tensor as Megatron stores it, without padding of the vocabulary.

    Attributes:
        names: its spellings, of a layer's tensors the part behind the layer; the first is what megatron-core writes.
        layer: number of the layer, None outside layers.
        padded: rows may follow that belong to no token.
    """

    names: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    padded: bool = False

    @property
    def interleaved(self) -> bool:
        """Whether reading a piece by itself would mean many small rectangles."""
        return any(len(piece.rows) > 1 for piece in self.pieces)

    def places(self) -> Iterator[tuple[str, int | None]]:
        """(key, index in the first dim or None) of every way in which a checkpoint may hold it, most usual first."""
        for name in self.names:
            if self.layer is None:
                yield name, None
            else:
                yield f"{LAYERS}{name}", self.layer
                yield f"{LAYERS}{self.layer}.{name}", None


def _whole(names: tuple[str, ...], name: str, shape: tuple[int, ...], layer: int | None = None, padded: bool = False) -> Matrix:
    return Matrix(names, layer, shape, (Piece(name, shape, (Rows(0, 0, shape[0]),)),), padded)


def matrices(model: ModelConfig) -> Iterator[Matrix]:
    """Every tensor that Megatron keeps for `model`, in the order of the forward pass."""
    hidden, vocabulary = model.hidden_size, (model.vocab_size, model.hidden_size)
    yield _whole(("embedding.word_embeddings.weight",), "embedding.weight", vocabulary, padded=True)
    for layer in range(model.num_hidden_layers):
        yield from _layer(model, layer)
    yield _whole(("decoder.final_layernorm.weight",), "final_norm.weight", (hidden,))
    if not model.tie_word_embeddings:
        yield _whole(("output_layer.weight",), "head.weight", vocabulary, padded=True)


def _layer(model: ModelConfig, layer: int) -> Iterator[Matrix]:
    hidden, inner, head = model.hidden_size, model.intermediate_size, model.head_dim
    groups = model.num_key_value_heads
    queries = model.num_attention_heads // groups * head  # rows of one group's query heads
    group = queries + 2 * head
    prefix = f"layers.{layer}."

    def of_groups(name: str, count: int, start: int) -> Piece:
        rows = tuple(Rows(g * count, g * group + start, count) for g in range(groups))
        return Piece(f"{prefix}attention.{name}.weight", (groups * count, hidden), rows)

    def whole(names: tuple[str, ...], name: str, *shape: int) -> Matrix:
        return _whole(names, prefix + name, shape, layer)

    qkv = (of_groups("q", queries, 0), of_groups("k", head, queries), of_groups("v", head, queries + head))
    gate = Piece(f"{prefix}mlp.gate.weight", (inner, hidden), (Rows(0, 0, inner),), alone="_w")
    up = Piece(f"{prefix}mlp.up.weight", (inner, hidden), (Rows(0, inner, inner),), alone="_v")
    norm = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    yield whole(norm, "attention_norm.weight", hidden)
    yield Matrix(("self_attention.linear_qkv.weight",), layer, (groups * group, hidden), qkv)
    yield whole(("self_attention.linear_proj.weight",), "attention.o.weight", hidden, groups * queries)
    norm = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    yield whole(norm, "mlp_norm.weight", hidden)
    yield Matrix(("mlp.linear_fc1.weight",), layer, (2 * inner, hidden), (gate, up))
    yield whole(("mlp.linear_fc2.weight",), "mlp.down.weight", hidden, inner)
