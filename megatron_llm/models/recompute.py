"""Activations that backward makes again instead of keeping them: fewer bytes from F to B, more work in B.

Whole layers (Chen et al. 2016, arXiv 1604.06174) or chosen parts of them (Korthikanti et al. 2022, arXiv 2205.05198). Called by
`models/block.py` with what is made (and made again) and what uses it (once).
What each choice keeps and costs: `docs/memory.md`.

Why not `torch.utils.checkpoint`: it ends a recomputation where the last tensor was saved, but an autograd function of ours saves
when it is over, so the last product of a layer and its reduce-scatter would run again; and it cannot drop a tensor that
an operation behind the recomputed ones saves, as a projection does with the normalized input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_llm.config import TrainingConfig

Make = Callable[..., Tensor | tuple[Tensor, ...]]
Used = TypeVar("Used", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class Recompute:
    """Which parts of which layers are made again.

    Attributes:
        parts: "layer", or any of "attention", "norms" and "activation".
        every: in the layers whose index in the whole model this divides.
    """

    parts: frozenset[str] = frozenset()
    every: int = 1

    @classmethod
    def of(cls, training: TrainingConfig) -> Recompute:
        chosen: dict[str, list[str]] = {"none": [], "selective": [*training.recompute_modules], "full": ["layer"]}
        return cls(frozenset(chosen[training.recompute]), training.recompute_every)

    def at(self, layer: int) -> frozenset[str]:
        """The parts that are made again in a layer."""
        return self.parts if layer % self.every == 0 else frozenset()


def recomputed(when: bool, make: Make, use: Callable[..., Used], *inputs: Tensor) -> Used:
    """`use(*make(*inputs))`. If `when`, backward finds the inputs kept and nothing of what `make` made: it runs `make` again.

    That happens once, when the first of it is needed, and each tensor is let go of when it has been used. `use` runs only once;
    what it saves besides outputs of `make` is kept. `make` must do the same again, its collectives too: backward comes here in
    the same order on all ranks. Under `no_grad` nothing is kept anyway.
    """
    if not (when and torch.is_grad_enabled()):
        return use(*_as_tuple(make(*inputs)))
    return _Recomputation(make, inputs).run(use, inputs)


class _Recomputation:
    """One call of `make`: what it saves and then its outputs are numbered, and autograd keeps the numbers.

    Only autograd's saved numbers refer to this object, and it refers to no graph, so it goes when backward is done with them.
    """

    def __init__(self, make: Make, inputs: tuple[Tensor, ...]):
        self.make = make
        self.inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        self.saved = 0  # tensors that `make` saves
        self.used: set[int] = set()  # numbers of the outputs that `use` saves
        self.made: dict[int, Tensor] = {}

    def run(self, use: Callable[..., Used], inputs: tuple[Tensor, ...]) -> Used:
        with saved_tensors_hooks(self._number, self._take):
            outputs = _as_tuple(self.make(*inputs))
        numbers = {id(output): self.saved + place for place, output in enumerate(outputs)}

        def number_outputs(tensor: Tensor) -> Tensor | int:
            number = numbers.get(id(tensor))
            if number is None:
                return tensor
            self.used.add(number)
            return number

        with saved_tensors_hooks(number_outputs, self._take):
            return use(*outputs)

    def _number(self, tensor: Tensor) -> int:
        self.saved += 1
        return self.saved - 1

    def _take(self, kept: Tensor | int) -> Tensor:
        """In backward: what was kept, or what has that number."""
        if isinstance(kept, Tensor):
            return kept
        if kept not in self.made:
            self._make_again()
        return self.made.pop(kept)

    def _make_again(self) -> None:
        again: list[Tensor] = []
        # Gradients are on so that operations save; the graph that they build is dropped and never runs.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: again.append(tensor.detach()), _never):
            outputs = _as_tuple(self.make(*self.inputs))
        assert len(again) == self.saved, f"{self.make} saved {self.saved} tensors first and now {len(again)}"
        self.made = dict(enumerate(again))
        self.made.update((number, outputs[number - self.saved].detach()) for number in self.used)


def _as_tuple(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _never(packed: object) -> Tensor:
    raise AssertionError("the graph of a recomputation runs backward")
