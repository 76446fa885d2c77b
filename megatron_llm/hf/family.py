"""`Family`: everything the project knows about one Hugging Face architecture, as data.

A family is one file in `families/` that ends in `FAMILY = Family(...)`. The reader and the export derive names, shapes, places
and configs from it; `docs/add_a_family.md` is how to write one. Torch-free, so that a folder can be checked on a login node.

No arithmetic on the way in or out: a stored tensor is made of rectangles of logical tensors (`models/names.py`), copied as they
are. What differs in meaning (Gemma's 1 + w, interleaved rotation) is an option of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ROPE_KEYS, ConfigReader
from megatron_llm.models.names import logical_tensors

Arrangement = Callable[[ModelConfig], Iterator[tuple[str, int, int]]]
"""The rows of a stored matrix in order, as (part, first row of that part's logical tensor, how many)."""


def grouped_qkv(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """For each key/value head: the query heads that share it, then the key, then the value.

    With as many key heads as query heads that is q, k, v head by head; with one, all queries, one key, one value.
    """
    dim, groups = model.head_dim, model.num_key_value_heads
    queries = model.num_attention_heads // groups * dim
    for group in range(groups):
        yield from (("q", group * queries, queries), ("k", group * dim, dim), ("v", group * dim, dim))


def concatenated_qkv(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """All queries, all keys, all values."""
    keys = model.num_key_value_heads * model.head_dim
    yield from (("q", 0, model.num_attention_heads * model.head_dim), ("k", 0, keys), ("v", 0, keys))


def gate_then_up(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """All of gate, all of up."""
    yield from (("gate", 0, model.intermediate_size), ("up", 0, model.intermediate_size))


@dataclass(frozen=True)
class Row:
    """One line of a family's table: where a folder keeps what.

    Attributes:
        hf: the folder's name. `{i}` stands for every layer, `{kind}` for weight and bias, `{h}` for every head of a tensor
            whose rows are heads.
        logical: our name, with the same placeholders, and `{part}` for the parts of `arrangement`. A line whose logical tensor
            the model does not have is skipped.
        arrangement: what the rows of a fused matrix (and the elements of its bias) are.
        transposed: stored [inputs, outputs], as GPT-2's Conv1D; biases are not affected.
        when: only for models of which this is true.
    """

    hf: str
    logical: str
    arrangement: Arrangement | None = None
    transposed: bool = False
    when: Callable[[ModelConfig], bool] = lambda model: True


@dataclass(frozen=True)
class Rows:
    """`count` rows: from `logical` on in the logical tensor, from `stored` on in the folder's, counted along its outputs."""

    logical: int
    stored: int
    count: int

    def within(self, start: int, count: int) -> Rows:
        """Those among the logical rows start, ..., start + count - 1."""
        first, end = max(self.logical, start), min(self.logical + self.count, start + count)
        return Rows(first, self.stored + first - self.logical, max(0, end - first))


@dataclass(frozen=True)
class Piece:
    """A logical tensor, or some rows of it, inside a stored one; `shape` is that of the whole logical tensor."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a folder: its name and shape there, and what it is made of. `transposed`: rows lie along its last dim."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False


def whole_tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
    """A logical tensor that is stored as it is under its own name."""
    return StoredTensor(name, shape, (Piece(name, shape, (Rows(0, 0, shape[0]),)),))


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture.

    Attributes:
        architectures: what config.json's `architectures` may say; the first is what we write.
        model_type: what config.json says too.
        from_hf: fields of ModelConfig from a config.json; what is not supported goes to `reader.problems`.
        to_hf: keys of config.json from a model, in the spelling of transformers 4, without architecture and dtype.
        table: where a folder keeps what, in the order of the forward pass.
        defaults: transformers' values of the keys that a config.json may leave out.
        aliases: other spellings of keys -> the one that `from_hf` reads (transformers' `attribute_map`).
        rope_names: rotary keys as Llama has them -> what this family calls them at the top of config.json, where that differs.
        prefix: what the names of the body begin with; folders of the bare body, and some old ones, leave it out.
        derived: regular expressions for the ends of names of buffers in old folders, which are computed and not imported.
    """

    architectures: tuple[str, ...]
    model_type: str
    from_hf: Callable[[ConfigReader], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    table: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    rope_names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    derived: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return self.architectures[0]

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ModelConfig. Raises ValueError with every reason why this engine cannot run what config.json describes."""
        reader = ConfigReader(config, self.defaults, self.aliases, self.rope_names)
        try:
            fields = self.from_hf(reader)
        except (
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
        ) as error:  # of what is no number, or no mapping
            raise ValueError(f"config.json of {self.architecture}: a value is not what it should be ({error})") from error
        reader.refuse_general(self.architectures)
        if reader.problems:
            raise ValueError(f"config.json of {self.architecture}: " + "; ".join(reader.problems))
        return fields

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """A whole config.json for a model that has none, without its dtype. Raises ValueError if the family has no such model."""
        config = {"architectures": [self.architecture], "model_type": self.model_type, **self.to_hf(model)}
        if different := _differences(model, ModelConfig(**self.fields(config))):
            raise ValueError(f"{self.architecture} has no model with {', '.join(different)}")
        list(self.stored_tensors(model))
        return config

    def patch(self, config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
        """`config` changed where it does not describe `model`, in its own spelling; all other fields are kept.

        Raises ValueError if the family has no such model.
        """
        before, after = self.to_hf(ModelConfig(**self.fields(config))), self.to_hf(model)
        names = {key: self.rope_names.get(key, key) for key in ROPE_KEYS}
        rope = {key: after[name] for key, name in names.items() if name in after}
        changed = {key for key, value in after.items() if before.get(key) != value}
        changed_rope = {key for key in rope if names[key] in changed}
        for wanted in (changed_rope, set(rope)):  # all of it, where one setting follows from another
            reader = ConfigReader(config, self.defaults, self.aliases, self.rope_names)
            for key in changed - set(names.values()):
                reader.put(key, after[key])
            if wanted:
                reader.put_rope(rope, wanted)
            different = _differences(model, ModelConfig(**self.fields(reader.patched)))
            if not different:
                return reader.patched
        raise ValueError(f"{self.architecture} has no model with {', '.join(different)}")

    def stored_tensors(self, model: ModelConfig, prefixed: bool = True) -> Iterator[StoredTensor]:
        """Every tensor of a folder with `model`, each once, in the order of the table, the layers one after the other.

        prefixed: whether names begin with `prefix`. Raises ValueError if the table has no place for a tensor of the model.
        """
        shapes = dict(logical_tensors(model))
        missing = set(shapes)
        for row, layer in self._lines(model):
            for kind in ("weight", "bias") if "{kind}" in row.logical else ("",):
                for stored in _expand(row, model, shapes, {"i": layer, "kind": kind}):
                    missing -= {piece.name for piece in stored.pieces}
                    name = stored.name if prefixed else stored.name.removeprefix(self.prefix)
                    yield StoredTensor(name, stored.shape, stored.pieces, stored.transposed)
        if missing:
            raise ValueError(f"{self.architecture} has no place for {', '.join(sorted(missing)[:5])}")

    def _lines(self, model: ModelConfig) -> Iterator[tuple[Row, int]]:
        """The table with the lines of the layers repeated for each."""
        rows = [row for row in self.table if row.when(model)]
        for in_layer, group in groupby(rows, lambda row: "{i}" in row.logical):
            lines = list(group)
            for layer in range(model.num_hidden_layers if in_layer else 1):
                yield from ((row, layer) for row in lines)

    def hf_name(self, logical: str, prefixed: bool = True) -> str:
        """The folder's name of a matrix that exists once, such as `head.weight`."""
        kind = logical.rpartition(".")[2]
        found = next(row.hf for row in self.table if row.logical.replace("{kind}", kind) == logical)
        name = found.replace("{kind}", kind)
        return name if prefixed else name.removeprefix(self.prefix)

    def is_prefixed(self, names: Iterable[str]) -> bool:
        """Whether a folder with tensors of these names uses the prefix."""
        return not self.prefix or any(name.startswith(self.prefix) for name in names)

    def is_derived(self, name: str) -> bool:
        """Whether a tensor of a folder is a computed buffer."""
        return any(re.search(f"(?:^|\\.)(?:{pattern})$", name) for pattern in self.derived)


def _expand(row: Row, model: ModelConfig, shapes: dict[str, tuple[int, ...]], values: dict[str, Any]) -> Iterator[StoredTensor]:
    """The stored tensors that one line stands for: none if the model lacks the logical ones."""
    hf = row.hf.format_map(values | {"h": "{h}"})
    logical = row.logical.format_map(values | {"part": "{part}"})
    if row.arrangement is None:
        if logical not in shapes:
            return
        shape = shapes[logical]
        if "{h}" in row.hf:
            for head in range(shape[0]):
                yield StoredTensor(hf.format(h=head), shape[1:], (Piece(logical, shape, (Rows(head, 0, 1),)),))
            return
        pieces: tuple[Piece, ...] = (Piece(logical, shape, (Rows(0, 0, shape[0]),)),)
    else:
        rows: dict[str, list[Rows]] = {}
        place = 0
        for part, first, count in row.arrangement(model):
            rows.setdefault(logical.format(part=part), []).append(Rows(first, place, count))
            place += count
        if not rows.keys() <= shapes.keys():
            return
        pieces = tuple(Piece(name, shapes[name], tuple(found)) for name, found in rows.items())
        shape = (place, *shapes[pieces[0].name][1:])
    transposed = row.transposed and len(shape) == 2
    yield StoredTensor(hf, shape[::-1] if transposed else shape, pieces, transposed)


def _differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two models differ as decoders: `name value`."""
    mine, theirs, values = _meaning(model), _meaning(other), model.model_dump()
    return [f"{name} {json.dumps(values[name])}" for name, value in mine.items() if value != theirs.get(name)]


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """The fields that make the decoder what it is, the same for all ways to say the same."""
    ignored = {"hf", "checkpoint", "checkpoint_ema", "resize_vocab", "initializer_range", "max_position_embeddings"}
    if model.position_embedding == "learned":
        ignored.remove("max_position_embeddings")
    layers = range(model.num_hidden_layers)
    windows = [model.window(layer) for layer in layers]
    local = (model.rope_theta, model.rope_scaling) if model.rope_local_theta is None else (model.rope_local_theta, None)
    return model.model_dump(exclude=ignored | {"layer_types"}) | {
        "sliding_window": windows,
        "nope_layers": sorted(set(model.nope_layers)),
        "attention_scale": [model.scale(layer) for layer in layers],
        "rope_local_theta": local if any(windows) else None,
    }
