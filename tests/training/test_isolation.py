"""Conversations of a row never see each other: not one bit of one depends on a token of another, on any stage of any layout.

Every token of a packed batch is replaced by another one in turn. What every layer puts out, the logits, the loss of each other
conversation and the gradient at each other conversation's input embeddings must stay equal to the bit; what comes after the
token in its own conversation must not, so that the test would notice a layer that looks at nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel import head
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.step import _run_microbatches
from tests.decoders import DECODERS, AllRandom
from tests.ranks import run_ranks
from tests.runs import TINY, config_of
from tests.tiers import slow_among, slow_one_in

CONVERSATIONS = (3, 1, 6, 6, 4, 4)  # neighbours of equal length, which attention computes together; two rows of 12
LENGTH = 12
VOCABULARY = 61
WHOSE = [number for number, length in enumerate(CONVERSATIONS) for _ in range(length)]


def _batch(change: int | None = None, only: int | None = None) -> Batch:
    """The packed batch, with one token replaced, with loss on all conversations or on only one."""
    generator = torch.Generator().manual_seed(1)
    total = sum(CONVERSATIONS)
    tokens = torch.randint(0, VOCABULARY, (total,), generator=generator)
    labels = torch.randint(0, VOCABULARY, (total,), generator=generator)
    weights = torch.rand(total, generator=generator) + 0.1
    if change is not None:
        tokens[change] = (tokens[change] + 7) % VOCABULARY
    if only is not None:
        weights *= torch.tensor([float(number == only) for number in WHOSE])
    boundaries = torch.tensor((0, *CONVERSATIONS)).cumsum(0).tolist()
    return Batch(tokens, labels, weights, torch.cat([torch.arange(n) for n in CONVERSATIONS]), tuple(boundaries))


class _OneBatch:
    def __init__(self, batch: Batch):
        self._batch = batch

    def batch(self, rows: Any) -> Batch:
        return dataclasses.replace(self._batch)


class _Watch:
    """What one rank computes about each token: by name, a tensor whose first dimension is the tokens."""

    def __init__(self, engine: Engine):
        self.engine, self.seen = engine, dict[str, Tensor]()
        for stage in engine.stages.values():
            for index, layer in zip(stage.indices, stage.layers, strict=True):
                layer.register_forward_hook(self._keep(f"layer {index}"))
            if stage.first:
                stage.embedding.register_forward_hook(self._watch_gradient)

    def _keep(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self.seen[name] = output.detach().clone()

        return hook

    def _watch_gradient(self, module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: self.seen.__setitem__("gradient", gradient.clone()))

    def run(self, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """(what was seen, loss sum of this rank) of one step's forward and backward."""
        self.seen.clear()
        self.engine.optimizer.zero_gradients()
        make = head._logits

        def logits(*of: Any) -> Tensor:
            made = make(*of)
            self.seen["logits"] = made.clone()  # their gradient will stand in their place
            return made

        with patch.object(head, "_logits", logits):
            sums = _run_microbatches(self.engine, self.engine.schedule, _OneBatch(batch), range(2))  # type: ignore[arg-type]
        self.engine.optimizer.reduce_gradients()
        return dict(self.seen), float(sums[0])


def _differences(engine: Engine) -> Iterator[tuple[int, str, list[int]]]:
    """(changed token, what was seen, the tokens for which it is not the same to the bit), for the change of every token."""
    watch, tp = _Watch(engine), engine.grid.tp
    before, _ = watch.run(_batch())
    losses = {number: watch.run(_batch(only=number))[1] for number in range(len(CONVERSATIONS))}
    for change, conversation in enumerate(WHOSE):
        after, _ = watch.run(_batch(change))
        assert after.keys() == before.keys()
        for name, value in after.items():
            first = tp.rank * len(value) if len(value) < len(WHOSE) else 0  # sequence parallel: a rank's own tokens
            same = (value == before[name]).flatten(1).all(1)
            yield change, name, [first + int(token) for token in torch.nonzero(~same)]
        others = [number for number in losses if number != conversation]
        other = others[change % len(others)]
        if watch.run(_batch(change, only=other))[1] != losses[other]:
            yield change, "loss", [token for token, owner in enumerate(WHOSE) if owner == other]


def _rank(config: Config) -> list[tuple[int, str, list[int]]]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    return list(_differences(build_engine(config, grid, torch.device("cpu"), AllRandom(5))))


def _check(decoder: str, world: int, parallel: dict[str, Any], compute: str = "float32", **training: Any) -> None:
    model = dict(DECODERS[decoder], num_hidden_layers=8) if decoder else _LLAMA
    if model.get("sliding_window"):
        model["sliding_window"] = 3
    if model.get("layer_types"):
        model["layer_types"] = ["sliding_attention", "full_attention"] * 4
    config = config_of(
        TINY, model=model, parallel=parallel, precision={"compute": compute},
        training={"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 2, **training},
    )  # fmt: skip
    found: dict[tuple[int, str], set[int]] = {}
    for seen in run_ranks(world, _rank, config):
        for change, name, tokens in seen:
            found.setdefault((change, name), set()).update(tokens)
    layers = config.model.num_hidden_layers
    assert {name for _, name in found} - {"loss"} == {"logits", "gradient", *(f"layer {index}" for index in range(layers))}
    for (change, name), tokens in found.items():
        own = {token for token, owner in enumerate(WHOSE) if owner == WHOSE[change]}
        assert tokens <= own, f"token {change} changes {name} of {sorted(tokens - own)}, which are of other conversations"
        assert change in tokens or name == "gradient", f"{name} of token {change} does not depend on it"
        if name not in ("gradient", "loss"):
            assert min(tokens) == change, f"{name} looks ahead"
    # What is learned of a first token reaches all of its conversation.
    first = WHOSE.index(2)
    assert found[first, f"layer {layers - 1}"] == {first + place for place in range(CONVERSATIONS[2])}


_LLAMA = {"vocab_size": VOCABULARY, "num_hidden_layers": 8, "initializer_range": 0.3}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 without sequence parallel": (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "pp4": (4, {"pipeline_parallel": 4}),
    "pp4 zb_h1": (4, {"pipeline_parallel": 4, "pipeline_schedule": "zb_h1"}),
    "pp2 zb_v": (2, {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
    "pp4 interleaved": (4, {"pipeline_parallel": 4, "pipeline_schedule": "interleaved", "virtual_stages": 2}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2 pp4": (8, {"tensor_parallel": 2, "pipeline_parallel": 4}),
}


FAST = ("one process", "pp4", "tp2 pp2")


@pytest.mark.parametrize("layout", FAST)
def test_no_bit_of_a_conversation_depends_on_another(layout: str) -> None:
    _check("", *LAYOUTS[layout])


OTHERS = [layout for layout in LAYOUTS if layout not in FAST]


@pytest.mark.parametrize("layout", slow_among([layout for layout in OTHERS if layout not in ("tp2", "tp2 pp4")], OTHERS))
def test_in_other_layouts(layout: str) -> None:
    _check("", *LAYOUTS[layout])


@pytest.mark.parametrize(("layout", "compute"), slow_one_in(3, product(["pp4 zb_h1", "tp2 pp2"], ["float64", "bfloat16"])))
def test_in_other_precisions(layout: str, compute: str) -> None:
    _check("", *LAYOUTS[layout], compute=compute)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_of_any_decoder(decoder: str) -> None:
    _check(decoder, *LAYOUTS["one process"])


@pytest.mark.parametrize("decoder", slow_among(("falcon", "gemma2"), DECODERS))
def test_of_any_decoder_on_many_ranks(decoder: str) -> None:
    _check(decoder, *LAYOUTS["tp2 pp2"])


@pytest.mark.parametrize("recompute", slow_among(("full",), ["full", "selective"]))
def test_with_recomputation(recompute: str) -> None:
    _check("", *LAYOUTS["tp2 pp2"], recompute=recompute)
