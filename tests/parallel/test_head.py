"""The head and its loss in chunks of tokens are torch's linear and cross_entropy on whole logits, in float64, on 1 to 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.config import ParallelConfig
from megatron_llm.ops.cross_entropy import Penalties
from megatron_llm.parallel import head as head_module
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.head import Head, chunk_tokens, linear_objective, linear_scores
from megatron_llm.parallel.linear import OutputShard
from megatron_llm.parallel.loss import VocabularySlice
from megatron_llm.parallel.weight_grad import WeightGradients
from tests.planning.live import LiveBytes
from tests.ranks import run_ranks

T, H, V = 24, 6, 13  # of 13 ids two ranks have 7 and 6, four have 4, 4, 4 and 1
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W, B = _random(1, T, H), _random(2, V, H) * 2, _random(3, V)
LABELS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(4))
WEIGHTS = torch.rand(T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WEIGHTS[::5] = 0.0
IGNORED = LABELS.clone()
IGNORED[::5] = -100  # a label that is ignored need not be one


@dataclass(frozen=True)
class Case:
    """chunk: tokens of one."""

    world: int
    sequence_parallel: bool = True
    chunk: int = 8
    cap: float | None = None
    penalties: Penalties = Penalties()
    bias: bool = True
    main_grad: bool = False
    scale: float = 1.0


def _head(case: Case) -> tuple[Head, slice]:
    tp = Grid.build(ParallelConfig(tensor_parallel=case.world), 1).tp
    shard = OutputShard.even("head.weight", V, tp)
    rows = slice(shard.start, shard.stop)
    weight = nn.Parameter(torch.full((shard.local_rows, H), 7.0, dtype=torch.float64))  # padding that would swamp everything
    bias = nn.Parameter(torch.full((shard.local_rows,), 1e3, dtype=torch.float64))
    weight.data[: shard.stop - shard.start], bias.data[: shard.stop - shard.start] = W[rows], B[rows]
    if case.main_grad:
        for parameter in (weight, bias):
            parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    vocabulary = VocabularySlice(shard.start, shard.stop, tp, case.cap)
    return Head(weight, bias if case.bias else None, vocabulary, case.sequence_parallel and case.world > 1), rows


def _shard(x: Tensor, head: Head) -> Tensor:
    tp = head.vocabulary.tp
    return x.chunk(tp.size)[tp.rank] if head.gather else x


def _run(case: Case) -> dict[str, Any]:
    """This rank's numbers, gradients without padding, and the padding's."""
    head, rows = _head(case)
    x = _shard(X, head).clone().requires_grad_()
    used = rows.stop - rows.start
    tp = head.vocabulary.tp
    before = tp.traffic.copy()
    with mock.patch.object(head_module, "chunk_tokens", lambda vocabulary, size: case.chunk):
        objective, loss = linear_objective(x, head, IGNORED, WEIGHTS, case.penalties, case.scale)
        (objective if case.main_grad else 3 * objective).backward()
        losses, hits = linear_scores(x.detach(), head, LABELS)
    assert not loss.requires_grad and x.grad is not None
    found: dict[str, Any] = {"objective": objective.detach(), "loss": loss, "x": x.grad, "losses": losses, "hits": hits}
    for name, parameter in (("weight", head.weight), ("bias", head.bias)):
        if parameter is not None:
            gradient = parameter.main_grad - 1 if case.main_grad else parameter.grad  # type: ignore[attr-defined]
            assert (parameter.grad is None) == case.main_grad
            found[name], found[f"{name} padding"] = gradient[:used], gradient[used:]
    found["traffic"] = (tp.traffic - before).payload
    return found


def _expected(case: Case) -> dict[str, Tensor]:
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (X, W, B))
    logits = functional.linear(x, weight, bias if case.bias else None)
    if case.cap is not None:
        logits = torch.tanh(logits / case.cap) * case.cap
    plain = functional.cross_entropy(logits, LABELS, reduction="none")
    terms = functional.cross_entropy(logits, LABELS, reduction="none", label_smoothing=case.penalties.smoothing)
    terms = terms + case.penalties.z_loss * logits.logsumexp(1).square()
    objective = (terms * WEIGHTS).sum() * case.scale
    (objective if case.main_grad else 3 * objective).backward()
    assert x.grad is not None and weight.grad is not None
    found = {"objective": objective, "loss": (plain * WEIGHTS).sum(), "x": x.grad, "weight": weight.grad}
    found |= {"losses": plain} | ({"bias": bias.grad} if bias.grad is not None else {})
    return {name: value.detach() for name, value in found.items()} | {"hits": logits.argmax(1) == LABELS}


def _assert_torchs(case: Case) -> None:
    results, expected = run_ranks(case.world, _run, case), _expected(case)
    gathered = case.sequence_parallel and case.world > 1
    for name, value in expected.items():
        if name in ("weight", "bias") or (name == "x" and gathered):
            torch.testing.assert_close(torch.cat([result[name] for result in results]), value, rtol=1e-12, atol=1e-12)
        else:
            for result in results:
                torch.testing.assert_close(result[name], value, rtol=1e-12, atol=1e-12)
    for result in results:
        assert torch.equal(result["loss"], results[0]["loss"]) and torch.equal(result["objective"], results[0]["objective"])
        assert not result["weight padding"].any()


@WORLDS
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("chunk", [T, 8, 20], ids=["one chunk", "three", "an uneven one"])
def test_is_torchs(world: int, sequence_parallel: bool, chunk: int) -> None:
    _assert_torchs(Case(world, sequence_parallel, chunk))


@WORLDS
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_gradients_are_added_to_the_main_ones(world: int, sequence_parallel: bool) -> None:
    _assert_torchs(Case(world, sequence_parallel, main_grad=True, scale=1024.0, bias=False))


@WORLDS
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("penalties", [Penalties(V, 0.1), Penalties(V, 0.0, 0.02), Penalties(V, 0.3, 0.2)], ids=str)
def test_caps_and_penalties(world: int, cap: float | None, penalties: Penalties) -> None:
    _assert_torchs(Case(world, cap=cap, penalties=penalties, main_grad=cap is None))


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("chunk", [T, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ranks_exchange_three_numbers_a_token(sequence_parallel: bool, chunk: int, smoothing: float) -> None:
    """Four with smoothing, and to score; x and dx once, however many chunks. A number has 8 bytes here, in float32 4."""
    world = 4
    case = Case(world, sequence_parallel, chunk, penalties=Penalties(V, smoothing))
    numbers, hidden = world * T * 8, T * H * 8
    statistics = (4 if smoothing else 3) * numbers + 4 * numbers
    for result in run_ranks(world, _run, case):
        if sequence_parallel:  # x for the scores once more
            assert result["traffic"] == {"all_gather": statistics + 2 * hidden, "reduce_scatter": hidden}
        else:
            assert result["traffic"] == {"all_gather": statistics, "all_reduce": hidden}


def _alone(weight: Tensor, bias: Tensor | None = None, cap: float | None = None) -> Head:
    return Head(weight, bias, VocabularySlice(0, len(weight), Axis("none"), cap), False)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("penalties", [Penalties(), Penalties(5, 0.2, 0.1)], ids=str)
def test_gradcheck(cap: float | None, penalties: Penalties) -> None:
    x, weight, bias = (_random(seed, *shape).requires_grad_() for seed, shape in ((1, (7, 3)), (2, (5, 3)), (3, (5,))))
    labels, weights = torch.tensor([0, 4, -100, 2, 2, 1, 3]), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.3])

    def objective(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_objective(x, _alone(weight, bias, cap), labels, weights, penalties)[0]

    with mock.patch.object(head_module, "chunk_tokens", lambda vocabulary, size: 3):
        torch.autograd.gradcheck(objective, (x, weight, bias))


def test_what_is_frozen_gets_no_gradient() -> None:
    x, weight = X.clone().requires_grad_(), nn.Parameter(W.clone(), requires_grad=False)
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    (2 * linear_objective(x, _alone(weight), IGNORED, WEIGHTS)[0]).backward()
    expected = X.clone().requires_grad_()
    (2 * (functional.cross_entropy(functional.linear(expected, W), LABELS, reduction="none") * WEIGHTS).sum()).backward()
    assert x.grad is not None and expected.grad is not None
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-12, atol=1e-12)
    assert not weight.main_grad.any() and weight.grad is None  # type: ignore[attr-defined]
    trained = nn.Parameter(W.clone())
    linear_objective(X, _alone(trained), IGNORED, WEIGHTS)[0].backward()
    assert trained.grad is not None and trained.grad.any()


def test_without_grad_mode_nothing_is_added() -> None:
    weight = nn.Parameter(W.clone())
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with torch.no_grad():
        objective, loss = linear_objective(X.clone().requires_grad_(), _alone(weight), IGNORED, WEIGHTS)
    assert not objective.requires_grad and torch.equal(objective, loss)
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


def test_a_multiple_of_the_objective_has_no_backward_beside_a_main_grad() -> None:
    weight = nn.Parameter(W.clone())
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="not for a multiple"):
        (2 * linear_objective(X, _alone(weight), IGNORED, WEIGHTS)[0]).backward()


def test_the_weight_is_counted_in_the_backward() -> None:
    module = nn.Linear(H, V, bias=False, dtype=torch.float64)
    module.weight.main_grad = torch.zeros_like(module.weight)  # type: ignore[assignment]
    queue, done = WeightGradients([module]), []
    queue.on_last = done.append
    queue.begin_step(2)
    objectives = [linear_objective(X, _alone(module.weight), IGNORED, WEIGHTS)[0] for _ in range(2)]
    for objective in objectives:
        assert not done
        objective.backward()
    assert done == [module.weight]
    queue.end_step()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    x, weight, bias = X[:tokens].clone().requires_grad_(), nn.Parameter(W.clone()), nn.Parameter(B.clone())
    head = _alone(weight, bias)
    objective, loss = linear_objective(x, head, LABELS[:tokens], torch.ones(tokens))
    objective.backward()
    expected = functional.cross_entropy(functional.linear(X[:tokens], W, B), LABELS[:tokens], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert x.grad is not None and x.grad.shape == x.shape and weight.grad is not None and bool(weight.grad.any()) == bool(tokens)
    losses, hits = linear_scores(x, head, LABELS[:tokens])
    assert losses.shape == hits.shape == (tokens,)


def _peak(world: int, tokens: int, chunk: int) -> int:
    """Bytes that were alive at most, besides x, weight, its main gradient and what a caller keeps of every token."""
    vocabulary, hidden = 512, 16
    weight = nn.Parameter(torch.randn(vocabulary, hidden))
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    tp = Grid.build(ParallelConfig(tensor_parallel=world), 1).tp
    head = Head(weight, None, VocabularySlice(tp.rank * vocabulary, (tp.rank + 1) * vocabulary, tp), tp.size > 1)
    x = torch.randn(tokens // tp.size, hidden, requires_grad=True)
    labels, weights = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    with (
        mock.patch.object(head_module, "chunk_tokens", lambda vocabulary, size: chunk),
        mock.patch.dict("megatron_llm.ops.cross_entropy.CHUNK_ELEMENTS", {"cpu": 1 << 14}),
        LiveBytes([x, weight, weight.main_grad, labels, weights]) as live,  # type: ignore[list-item]
    ):
        start = live.now
        linear_objective(x, head, labels, weights)[0].backward()
    return live.peak - start


@pytest.mark.parametrize(("world", "alive"), [(1, 1), (2, 2)])
def test_memory_does_not_grow_with_tokens_times_vocabulary(world: int, alive: int) -> None:
    """It has `alive` chunks of logits, 128 tokens of 512 ids, whatever the tokens; what grows is dx."""
    chunk, logits = 128, 128 * 512 * 4
    short, long = (run_ranks(world, _peak, world, tokens, chunk) for tokens in (512, 1536))
    for few, many in zip(short, long, strict=True):
        assert alive * logits < few < (alive + 0.5) * logits
        assert many - few < 3 * 1024 * 16 * 4 / world  # as many dx, while its chunks are joined, and smaller things


def test_tokens_of_a_chunk() -> None:
    assert chunk_tokens(128256, 2) == 2048 and chunk_tokens(256000, 2) == 2048
    assert chunk_tokens(128256 // 8, 2) == 16384 and chunk_tokens(32000, 2) == 8192
    assert chunk_tokens(1, 2) == 1 << 28 and chunk_tokens(0, 2) == 1 << 29
