"""Sharded layers on 2 and 4 ranks equal plain torch on one, in float64: outputs, input and weight gradients.

The worker functions return pickled local results; the tests assemble them by the shard specs and compare.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.config import ModelConfig, ParallelConfig
from megatron_llm.models.heads import Heads
from megatron_llm.ops.cross_entropy import Penalties
from megatron_llm.parallel.embedding import VocabParallelEmbedding
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.head import Head, linear_scores
from megatron_llm.parallel.linear import (
    ColumnParallelLinear,
    OutputShard,
    RowParallelLinear,
    balanced,
    column_parallel,
    most_of,
    row_parallel,
    sharded_bias,
    sharded_weight,
)
from megatron_llm.parallel.loss import VocabularySlice, vocab_parallel_cross_entropy, vocab_parallel_objective
from megatron_llm.parallel.shard import ShardSpec
from megatron_llm.parallel.weight_grad import WeightGradients
from tests.ranks import run_ranks

TOKENS, HIDDEN, HEADS, KV_HEADS, DIM = 8, 6, 4, 2, 3
CPU = torch.device("cpu")

Grads = dict[str, list[tuple[tuple[slice, ...], Tensor]]]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {
    "q": _random(1, HEADS * DIM, HIDDEN),
    "k": _random(2, KV_HEADS * DIM, HIDDEN),
    "v": _random(3, KV_HEADS * DIM, HIDDEN),
    "o": _random(4, 5, HEADS * DIM),
}


def _grid(world: int) -> Grid:
    return Grid.build(ParallelConfig(tensor_parallel=world), KV_HEADS)


def _fill(weight: nn.Parameter, whole: dict[str, Tensor], main_grad: bool) -> None:
    """Values from the logical tensors; a buffer of ones shows that gradients are added to what is there."""
    spec: ShardSpec = weight.shard  # type: ignore[attr-defined]
    for part in spec.parts:
        for local, logical in part.pairs:
            weight.data[local.slices] = whole[part.name][logical.slices]
    if main_grad:
        weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]


def _gradients(weight: nn.Parameter) -> Grads:
    """The gradient of each logical tensor by box; padding must have none."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None:
        assert weight.grad is None, "a gradient in main_grad must not be kept twice"
        gradient = main_grad - 1
    else:
        assert weight.grad is not None
        gradient = weight.grad
    found: Grads = {}
    held = torch.zeros_like(gradient, dtype=torch.bool)
    for part in weight.shard.parts:  # type: ignore[attr-defined]
        for local, logical in part.pairs:
            found.setdefault(part.name, []).append((logical.slices, gradient[local.slices]))
            held[local.slices] = True
    assert not gradient[~held].any()
    return found


def _assemble(name: str, shape: torch.Size, ranks: list[Grads]) -> Tensor:
    """Sum of all ranks' gradients by box: shards tile the tensor, replicas hold partial sums."""
    total = torch.zeros(shape, dtype=torch.float64)
    for grads in ranks:
        for index, value in grads.get(name, []):
            total[index] += value
    return total


def _shard_of(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world)[rank]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


MODES = pytest.mark.parametrize(
    ("sequence_parallel", "main_grad"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "main_grad", "sequence parallel", "sequence parallel, main_grad"],
)
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


# Linear


def _linear(world: int, sequence_parallel: bool, main_grad: bool) -> dict[str, Any]:
    """x -> fused q, k, v (k and v on two ranks each when there are four) ; a function of q -> o."""
    grid = _grid(world)
    tp = grid.tp
    sizes = {"vocab_size": 1, "hidden_size": HIDDEN, "intermediate_size": 1, "num_hidden_layers": 1}
    heads = Heads.of(
        ModelConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, position_embedding="none"),
        grid,
    )
    shards = [
        OutputShard.even("q", HEADS * DIM, tp),
        OutputShard.of("k", KV_HEADS * DIM, heads.keys, heads.most_keys, DIM, grid.kv_replica),
        OutputShard.of("v", KV_HEADS * DIM, heads.keys, heads.most_keys, DIM, grid.kv_replica),
    ]
    qkv = ColumnParallelLinear(sharded_weight(HIDDEN, shards, torch.float64, CPU), tp)
    o = RowParallelLinear("o", HEADS * DIM, 5, tp, torch.float64, CPU)
    for layer in (qkv, o):
        _fill(layer.weight, WEIGHTS, main_grad)

    x, dy = _random(10, TOKENS, HIDDEN), _random(11, TOKENS, 5)
    if sequence_parallel:
        x, dy = _shard_of(x, tp.rank, world), _shard_of(dy, tp.rank, world)
    x.requires_grad_()
    q, k, v = qkv(x, sequence_parallel).split([shard.local_rows for shard in shards], dim=1)
    copies = q.shape[1] // k.shape[1]
    mixed = q * (k * v.sin()).unflatten(1, (-1, DIM)).repeat_interleave(copies, 1).flatten(1)
    y = o(mixed, sequence_parallel)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "grads": _gradients(qkv.weight) | _gradients(o.weight)}


@WORLDS
@MODES
def test_column_and_row_parallel_linear(world: int, sequence_parallel: bool, main_grad: bool) -> None:
    results = run_ranks(world, _linear, world, sequence_parallel, main_grad)
    x = _random(10, TOKENS, HIDDEN).requires_grad_()
    whole = {name: weight.clone().requires_grad_() for name, weight in WEIGHTS.items()}
    q, k, v = (x @ whole[name].t() for name in "qkv")
    expected = (q * (k * v.sin()).unflatten(1, (-1, DIM)).repeat_interleave(HEADS // KV_HEADS, 1).flatten(1)) @ whole["o"].t()
    expected.backward(_random(11, TOKENS, 5))
    assert x.grad is not None
    for rank, result in enumerate(results):
        assert_equal(result["y"], _shard_of(expected.detach(), rank, world) if sequence_parallel else expected.detach())
        assert_equal(result["dx"], _shard_of(x.grad, rank, world) if sequence_parallel else x.grad)
    for name, weight in whole.items():
        assert weight.grad is not None
        assert_equal(_assemble(name, weight.shape, [result["grads"] for result in results]), weight.grad)


def _frozen(world: int) -> tuple[Tensor | None, Tensor | None]:
    """Column-parallel with a frozen weight, and with an input that needs no gradient: (dx, dW)."""
    tp = _grid(world).tp
    layer = ColumnParallelLinear(sharded_weight(HIDDEN, [OutputShard.even("q", HEADS * DIM, tp)], torch.float64, CPU), tp)
    _fill(layer.weight, WEIGHTS, False)
    x = _shard_of(_random(10, TOKENS, HIDDEN), tp.rank, world)
    layer(x, True).sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer.weight.requires_grad_(False)
    layer.weight.main_grad = torch.zeros_like(layer.weight)  # type: ignore[attr-defined]
    x.requires_grad_()
    layer(x, True).sum().backward()
    assert layer.weight.grad is None and not layer.weight.main_grad.any()  # type: ignore[union-attr, operator]
    return x.grad, gradient


def test_gradients_that_nobody_needs_are_left_out() -> None:
    dxs, dws = zip(*run_ranks(2, _frozen, 2), strict=True)
    x = _random(10, TOKENS, HIDDEN)
    assert_equal(torch.cat(dxs), WEIGHTS["q"].sum(0).expand(TOKENS, HIDDEN))
    assert_equal(torch.cat(dws), x.sum(0).expand(HEADS * DIM, HIDDEN))


# Several linear layers at once, as in a parallel block

SIDES = {"a": 7, "b": 5}  # features that no number of ranks divides
ROWS = 12
BLOCK = {
    f"{side}.{name}": _random(number * 4 + place, *shape)
    for number, (side, size) in enumerate(SIDES.items())
    for place, (name, shape) in enumerate(
        {"up.weight": (size, HIDDEN), "up.bias": (size,), "down.weight": (HIDDEN, size), "down.bias": (HIDDEN,)}.items()
    )
}


def _side_by_side(world: int, sequence_parallel: bool, mode: str) -> dict[str, Any]:
    """x -> both sides' up, a function of each, the sum of both sides' down; all with biases."""
    tp = _grid(world).tp
    partial = sequence_parallel and world > 1
    ups, downs = [], []
    for side, size in SIDES.items():
        shards = [OutputShard.of(f"{side}.up.weight", size, balanced(size, tp), most_of(size, tp))]
        weight, bias = sharded_weight(HIDDEN, shards, torch.float64, CPU), sharded_bias(shards, torch.float64, CPU)
        ups.append(ColumnParallelLinear(weight, tp, bias))
        downs.append(RowParallelLinear(f"{side}.down.weight", size, HIDDEN, tp, torch.float64, CPU, bias=True, partial=partial))
    parameters = [*nn.ModuleList([*ups, *downs]).parameters()]
    for parameter in parameters:
        _fill(parameter, BLOCK, mode != "autograd")
    queue = WeightGradients([*ups, *downs]) if mode == "split" else None
    x, dy = _random(10, ROWS, HIDDEN), _random(11, ROWS, HIDDEN)
    if sequence_parallel:
        x, dy = _shard_of(x, tp.rank, world), _shard_of(dy, tp.rank, world)
    x.requires_grad_()
    a, b = column_parallel(x, ups, sequence_parallel)
    y = row_parallel([a.sin(), b.cos()], downs, sequence_parallel)
    if queue is None:
        y.backward(dy)
    else:
        queue.begin_step(1)
        with queue.deferred(0):
            y.backward(dy)
        assert all((parameter.main_grad == 1).all() for parameter in parameters)  # type: ignore[attr-defined]
        queue.run(0)
        queue.end_step()
    return {"y": y.detach(), "dx": x.grad, "grads": [(p.shard.parts[0].gradient_sum is None, _gradients(p)) for p in parameters]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence parallel"])
@pytest.mark.parametrize("mode", ["autograd", "main_grad", "split"])
def test_layers_of_one_input_and_layers_whose_outputs_are_added(world: int, sequence_parallel: bool, mode: str) -> None:
    results = run_ranks(world, _side_by_side, world, sequence_parallel, mode)
    x = _random(10, ROWS, HIDDEN).requires_grad_()
    whole = {name: tensor.clone().requires_grad_() for name, tensor in BLOCK.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, whole[f"{name}.weight"], whole[f"{name}.bias"])

    expected = linear(linear(x, "a.up").sin(), "a.down") + linear(linear(x, "b.up").cos(), "b.down")
    expected.backward(_random(11, ROWS, HIDDEN))
    assert x.grad is not None
    for rank, result in enumerate(results):
        assert_equal(result["y"], _shard_of(expected.detach(), rank, world) if sequence_parallel else expected.detach())
        assert_equal(result["dx"], _shard_of(x.grad, rank, world) if sequence_parallel else x.grad)
    for name, tensor in whole.items():
        assert tensor.grad is not None
        held = [(complete, grads) for result in results for complete, grads in result["grads"] if name in grads]
        replicated = name.endswith("down.bias")
        if replicated and all(complete for complete, _ in held):  # each rank has all of it
            for _, grads in held:
                assert_equal(_assemble(name, tensor.shape, [grads]), tensor.grad)
        else:
            assert replicated == (not all(complete for complete, _ in held))
            assert_equal(_assemble(name, tensor.shape, [grads for _, grads in held]), tensor.grad)


# Embedding


def _embedding(world: int, vocab: int, sequence_parallel: bool, main_grad: bool) -> dict[str, Any]:
    tp = _grid(world).tp
    shard = OutputShard.even("embedding", vocab, tp)
    weight = sharded_weight(HIDDEN, [shard], torch.float64, CPU)
    _fill(weight, {"embedding": _random(5, vocab, HIDDEN)}, main_grad)
    ids, dy = _ids(vocab), _random(12, TOKENS, HIDDEN)
    y = VocabParallelEmbedding(weight, shard.start, tp)(ids, sequence_parallel)
    y.backward(_shard_of(dy, tp.rank, world) if sequence_parallel else dy)
    return {"y": y.detach(), "grads": _gradients(weight)}


def _ids(vocab: int) -> Tensor:
    """The ends of the vocabulary, and one id three times."""
    return torch.tensor([0, vocab - 1, 3, 3, vocab // 2, 3, 1, vocab - 2])


@WORLDS
@MODES
@pytest.mark.parametrize("vocab", [9, 10])  # on 4 ranks, 3 rows each: the last holds only padding; one row and padding
def test_vocab_parallel_embedding(world: int, sequence_parallel: bool, main_grad: bool, vocab: int) -> None:
    results = run_ranks(world, _embedding, world, vocab, sequence_parallel, main_grad)
    table = _random(5, vocab, HIDDEN).requires_grad_()
    expected = functional.embedding(_ids(vocab), table)
    expected.backward(_random(12, TOKENS, HIDDEN))
    assert table.grad is not None
    for rank, result in enumerate(results):
        assert torch.equal(result["y"], _shard_of(expected, rank, world) if sequence_parallel else expected)
    assert_equal(_assemble("embedding", table.shape, [result["grads"] for result in results]), table.grad)


# Cross-entropy


def _loss(
    world: int, vocab: int, weights: Tensor, labels: Tensor, penalties: Penalties | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, what it is without penalties, gradient of this rank's true columns, gradient of its padding columns)."""
    tp = _grid(world).tp
    shard = OutputShard.even("head", vocab, tp)
    logits = torch.full((TOKENS, shard.local_rows), 1e3, dtype=torch.float64)  # padding that would swamp everything
    logits[:, : shard.stop - shard.start] = _random(6, TOKENS, vocab)[:, shard.start : shard.stop]
    leaf, vocabulary = logits.requires_grad_(), VocabularySlice(shard.start, shard.stop, tp)
    if penalties is None:
        loss = plain = vocab_parallel_cross_entropy(leaf * 1.0, labels, weights, vocabulary)
    else:
        loss, plain = vocab_parallel_objective(leaf * 1.0, labels, weights, vocabulary, penalties)
        assert not plain.requires_grad
    (3 * loss).backward()
    assert leaf.grad is not None
    parts = leaf.grad.split([shard.stop - shard.start, shard.local_rows - shard.stop + shard.start], dim=1)
    return loss.detach(), plain.detach(), *parts


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    tp = _grid(torch.distributed.get_world_size()).tp
    shard = OutputShard.even("head.weight", logits.shape[1], tp)
    local = functional.pad(logits[:, shard.start : shard.stop], (0, shard.local_rows - (shard.stop - shard.start)), value=1e9)
    identity = torch.eye(local.shape[1], dtype=local.dtype)
    return linear_scores(local, Head(identity, None, VocabularySlice(shard.start, shard.stop, tp), False), labels)


@pytest.mark.parametrize(("world", "vocab"), [(2, 12), (4, 9)])  # of 9 the last rank has none
def test_scores(world: int, vocab: int) -> None:
    """Most rows have several largest logits, on one rank and on several."""
    logits = _random(7, 40, vocab).mul(1.5).round()
    labels = torch.where(torch.arange(40) % 3 > 0, logits.argmax(1), torch.arange(40) % vocab)
    later = logits.flip(1).argmax(1).neg() + vocab - 1
    assert (later != logits.argmax(1)).sum() > 10
    labels[::5] = later[::5]
    for losses, hits in run_ranks(world, _scores, logits, labels):
        torch.testing.assert_close(losses, functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-12, atol=1e-12)
        assert torch.equal(hits, logits.argmax(1) == labels)


@WORLDS
@pytest.mark.parametrize("vocab", [9, 10])
@pytest.mark.parametrize("zero_weights", [False, True], ids=["some weights zero", "all weights zero"])
def test_vocab_parallel_cross_entropy(world: int, vocab: int, zero_weights: bool) -> None:
    _assert_loss(world, vocab, zero_weights, None)


@WORLDS
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.2)])
def test_vocab_parallel_objective_is_that_of_torch_on_whole_logits(world: int, smoothing: float, z_loss: float) -> None:
    """Smoothed over the true vocabulary: of 9 ids two ranks have 5 and 4, and one that is padding."""
    _assert_loss(world, 9, False, Penalties(9, smoothing, z_loss))


def _assert_loss(world: int, vocab: int, zero_weights: bool, penalties: Penalties | None) -> None:
    labels, weights = _ids(vocab), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0])
    if zero_weights:
        weights = torch.zeros(TOKENS)
    ignored = labels.clone()
    ignored[weights == 0] = -100  # a label that is ignored need not be one
    results = run_ranks(world, _loss, world, vocab, weights, ignored, penalties)
    logits = _random(6, TOKENS, vocab).requires_grad_()
    chosen = penalties or Penalties()
    plain = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    terms = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=chosen.smoothing)
    expected = ((terms + chosen.z_loss * logits.logsumexp(1).square()) * weights).sum()
    (3 * expected).backward()
    assert logits.grad is not None
    losses, without, gradients, padding = zip(*results, strict=True)
    for loss, other in zip(losses, without, strict=True):
        assert loss.dtype is torch.float64 and torch.equal(loss, losses[0]) and torch.equal(other, without[0])
        assert_equal(loss, expected.detach())
        assert_equal(other, plain.detach())
    assert_equal(torch.cat(gradients, dim=1), logits.grad)
    assert not torch.cat(padding, dim=1).any()
