"""Which linear layers have an adapter, and a model's weights with what its adapters have learned added to them.

The layers themselves: `parallel/lora.py`. Torch-free like `models/names.py`, but for reading. Called by `models/stages.py` (which
layers), `training/resolve.py` (refusals), `hf/peft.py`, and by `checkpoint/load.py` for everything that wants a plain model.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from megatron_llm.config import ModelConfig, PeftConfig
from megatron_llm.config.peft import LORA_A, LORA_B, is_adapter
from megatron_llm.models.names import layer_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_llm.parallel.shard import Box, Part, TensorSource, TypedSource

KINDS = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
_LLAMA = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), KINDS, strict=True))


def linear_layers(model: ModelConfig) -> list[str]:
    """`layers.I.KIND` of every linear layer of the decoder, without the head: what an adapter may belong to."""
    return [f"layers.{layer}.{kind}" for layer in range(model.num_hidden_layers) for kind in kinds(model)]


def kinds(model: ModelConfig) -> list[str]:
    """The linear layers of one layer."""
    there = {name for name, _ in layer_tensors(model, "")}
    return [kind for kind in KINDS if f"{kind}.weight" in there]


def adapted_layers(model: ModelConfig, peft: PeftConfig) -> list[str]:
    """The linear layers that `peft.targets` names, in the order of the model."""
    return [name for name in linear_layers(model) if any(_matches(name, target) for target in peft.targets)]


def target_problems(model: ModelConfig, peft: PeftConfig) -> list[str]:
    """A sentence for every target that is no layer of the model."""
    names = linear_layers(model)
    return [
        f"peft.targets: {target!r} is the name of no linear layer; there are all-linear, {', '.join(kinds(model))}, each also "
        f"of some layers, as layers.0.{kinds(model)[0]}"
        for target in peft.targets
        if not any(_matches(name, target) for name in names)
    ]


def _matches(name: str, target: str) -> bool:
    """A pattern is for whole names if it begins as they do, else for what follows the number of the layer."""
    target = "*" if target == "all-linear" else _LLAMA.get(target, target)
    return fnmatchcase(name if target.startswith("layers.") else name.split(".", 2)[2], target)


def shortest_targets(model: ModelConfig, names: Iterable[str]) -> list[str]:
    """Targets that mean exactly these linear layers: kinds where all layers have them, else whole names."""
    chosen = set(names)
    targets = []
    for kind in kinds(model):
        mine = [f"layers.{layer}.{kind}" for layer in range(model.num_hidden_layers)]
        targets += [kind] if chosen.issuperset(mine) else [name for name in mine if name in chosen]
    return targets


class MergedWeights:
    """A source of plain weights, W + scale * B A, from one of weights and adapters.

    The sum is made box by box in float32, or float64 where anything is that.

    Args:
        source: of W, A and B under their logical names. adapted: the linear layers that have an adapter.
    """

    def __init__(self, source: TypedSource, adapted: Iterable[str], peft: PeftConfig):
        self._source, self._peft = source, peft
        self._adapted = {f"{name}.weight" for name in adapted}

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of a logical tensor."""
        stored = self._source.dtype(name)
        return "F32" if name in self._adapted and stored != "F64" else stored

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of a box. Raises ValueError like the source, and for an adapter, which a plain model has not."""
        if is_adapter(part.name):
            raise ValueError(f"{part.name}: adapters are merged into the weights here")
        weight = self._source.read(part, box)
        if part.name not in self._adapted:
            return weight
        import torch

        from megatron_llm.parallel.shard import Box, Part

        (rows, columns), (outputs, inputs) = box.shape, part.shape
        name, rank = part.name.removesuffix(".weight"), self._peft.rank
        a = self._source.read(Part(name + LORA_A, (rank, inputs), ()), Box((0, box.offset[1]), (rank, columns)))
        b = self._source.read(Part(name + LORA_B, (outputs, rank), ()), Box((box.offset[0], 0), (rows, rank)))
        wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
        return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=self._peft.scale)


class WithAdapters:
    """Weights from one source and adapters from another."""

    def __init__(self, weights: TensorSource, adapters: TensorSource):
        self._weights, self._adapters = weights, adapters

    def read(self, part: Part, box: Box) -> Tensor:
        return (self._adapters if is_adapter(part.name) else self._weights).read(part, box)
