"""The split backward: B and W together are the unsplit backward, to the bit and to the FLOP, and little is kept in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.config import ModelConfig, ParallelConfig
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.norm import hidden_norm
from megatron_llm.models.setup import Setup
from megatron_llm.ops import matmul as matmul_module
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel import linear, weight_grad
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_llm.parallel.weight_grad import WeightGradients
from tests.decoders import DECODERS
from tests.ranks import run_ranks

T, V, H, F, LAYERS, HEADS, KV, D = 12, 22, 8, 12, 2, 4, 2, 4
MODEL = ModelConfig(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=F,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV,
    head_dim=D,
)
CPU = torch.device("cpu")
QKV = (HEADS + 2 * KV) * D


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _batch(seed: int) -> Batch:
    ids = torch.randint(0, V, (T + 1,), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:-1], ids[1:], torch.rand(T), torch.arange(T), (0, T))


def _stage(
    grid: Grid,
    first: bool,
    last: bool,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    sequence_parallel: bool = True,
    model: ModelConfig = MODEL,
) -> DecoderStage:
    """Some stage of the model with random weights and empty gradient buffers."""
    model = model.model_copy(update={"tie_word_embeddings": tied})
    stage = DecoderStage(
        model,
        grid,
        range(model.num_hidden_layers),
        first=first,
        last=last,
        sequence_parallel=sequence_parallel,
        dtype=dtype,
        device=CPU,
    )
    for seed, parameter in enumerate(stage.parameters()):
        parameter.data.copy_(_random(seed, *parameter.shape) * 0.3)
        parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.promote_types(dtype, torch.float32))  # type: ignore[attr-defined]
    return stage


def _forward(stage: DecoderStage, microbatch: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(input, output, gradient of the output); the loss and None on a last stage."""
    tokens = T // (stage.tp.size if stage.sequence_parallel else 1)
    width = stage.model.hidden_size
    x = None if stage.first else (_random(50 + microbatch, tokens, width) + stage.tp.rank).to(stage.dtype).requires_grad_()
    y = stage(x, _batch(microbatch))
    if stage.last:
        return x, stage.loss(y, _batch(microbatch)), None
    return x, y, _random(70 + microbatch, tokens, width).to(stage.dtype)


def _made_in_forward(stage: DecoderStage) -> list[str]:
    """The parameters that have their gradient before B: the head's weight, which may be the embedding's."""
    return [name for name, parameter in stage.named_parameters() if stage.last and parameter is stage.head.weight]


def _main_grads(stage: DecoderStage) -> dict[str, Tensor]:
    return {name: parameter.main_grad for name, parameter in stage.named_parameters()}  # type: ignore[misc]


# Equal to unsplit


def _both_ways(
    tp: int, first: bool, last: bool, tied: bool, dtype: torch.dtype, sequence_parallel: bool, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """Two micro-batches, first unsplit, then all B and all W: gradients and FLOPs of both ways."""
    grid = Grid.build(ParallelConfig(tensor_parallel=tp), model.num_key_value_heads)
    found: dict[str, Any] = {}
    for way in ("unsplit", "split"):
        torch.manual_seed(0)
        stage = _stage(grid, first, last, tied, dtype, sequence_parallel, model)
        gradients = WeightGradients([stage])
        gradients.begin_step(2)
        inputs, flops = [], {"B": 0, "W": 0}
        for mb in range(2):
            x, y, dy = _forward(stage, mb)
            with FlopCounterMode(display=False) as counter:
                if way == "split":
                    with gradients.deferred(mb):
                        torch.autograd.backward(y, dy)
                    made = [name for name, grad in _main_grads(stage).items() if grad.any()]
                    assert made == _made_in_forward(stage), "B must leave weight gradients alone"
                else:
                    torch.autograd.backward(y, dy)
            flops["B"] += counter.get_total_flops()
            inputs.append(None if x is None else x.grad)
        for mb in range(2) if way == "split" else ():
            with FlopCounterMode(display=False) as counter:
                gradients.run(mb)
            flops["W"] += counter.get_total_flops()
        assert all(parameter.grad is None for parameter in stage.parameters())
        found[way] = {"inputs": inputs, "weights": _main_grads(stage), "flops": flops}
    return found


def assert_same_bits(found: dict[str, Any]) -> None:
    unsplit, split = found["unsplit"], found["split"]
    for a, b in zip(unsplit["inputs"], split["inputs"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name, gradient in unsplit["weights"].items():
        assert gradient.any(), name
        assert torch.equal(gradient, split["weights"][name]), name


STAGES = pytest.mark.parametrize(("first", "last"), [(True, False), (False, False), (False, True), (True, True)])


@STAGES
def test_b_and_w_are_the_unsplit_backward_to_the_bit_and_to_the_flop(first: bool, last: bool) -> None:
    (found,) = run_ranks(1, _both_ways, 1, first, last, False, torch.float64, True)
    assert_same_bits(found)
    # Every linear weight costs 2 T FLOPs an element for each of the two gradients; W makes one of them and nothing else.
    # (The head's are made in F.)
    linear_weights = LAYERS * (QKV * H + HEADS * D * H + 2 * F * H + F * H)
    assert found["split"]["flops"]["W"] == 2 * 2 * T * linear_weights
    assert sum(found["split"]["flops"].values()) == found["unsplit"]["flops"]["B"] > 0


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel(tp: int, sequence_parallel: bool) -> None:
    """With 4 ranks the key/value heads are copied, and the vocabulary is padded in the next test."""
    for found in run_ranks(tp, _both_ways, tp, True, True, False, torch.float64, sequence_parallel):
        assert_same_bits(found)
        assert sum(found["split"]["flops"].values()) == found["unsplit"]["flops"]["B"]


@pytest.mark.parametrize(("name", "tp"), [*((name, 2) for name in DECODERS), ("falcon", 3), ("neox", 3)])
def test_other_decoders(name: str, tp: int) -> None:
    """Products of several weights at once, biases, and every kind of norm."""
    model = ModelConfig(**DECODERS[name] | {"vocab_size": V})
    for found in run_ranks(tp, _both_ways, tp, True, True, False, torch.float64, True, model):
        assert_same_bits(found)
        assert sum(found["split"]["flops"].values()) == found["unsplit"]["flops"]["B"]


def test_tied_embedding_adds_two_gradients_to_one_weight() -> None:
    (found,) = run_ranks(1, _both_ways, 1, True, True, True, torch.float64, True)
    for name, gradient in found["unsplit"]["weights"].items():  # two micro-batches' sums are made in another order
        torch.testing.assert_close(gradient, found["split"]["weights"][name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("emulated", [False, True], ids=["bfloat16 arithmetic", "widened"])
def test_bfloat16(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_module, "cpu_has_bfloat16", lambda: not emulated)
    assert_same_bits(_both_ways(1, True, True, False, torch.bfloat16, False))


def test_norm_gradients_accumulate_unrounded() -> None:
    model = ModelConfig(
        vocab_size=1, hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1, head_dim=2, norm_eps=1e-12
    )
    norm = hidden_norm("norm", Setup(model, Grid.single(), False, torch.bfloat16, CPU))
    norm.weight.main_grad = torch.zeros(1)  # type: ignore[assignment]
    for dy in ([[256.0], [1.0]], [[1.0], [0.0]]):  # in bfloat16 256 + 1 is 256
        norm(torch.ones(2, 1, dtype=torch.bfloat16)).backward(torch.tensor(dy, dtype=torch.bfloat16))
    assert norm.weight.main_grad.item() == 258.0 and norm.weight.grad is None


# What is kept


class _Storages(TorchDispatchMode):
    """Watches the memory of everything that operations make, other than views of weights and their gradients."""

    def __init__(self, stage: DecoderStage) -> None:
        super().__init__()
        kept = [*stage.parameters(), *_main_grads(stage).values(), stage.rotary.frequencies_P]
        self.kept = [tensor.untyped_storage() for tensor in kept]
        self.made: list[tuple[weakref.ref, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if not any(storage is kept for kept in self.kept):
                    self.made.append((weakref.ref(storage), storage.nbytes()))
        return result

    def bytes_alive(self) -> int:
        gc.collect()
        return sum({id(storage): size for reference, size in self.made if (storage := reference()) is not None}.values())


@STAGES
def test_between_b_and_w_only_the_operands_of_weight_gradients_are_alive(first: bool, last: bool) -> None:
    stage = _stage(Grid.single(), first, last)
    gradients = WeightGradients([stage])
    gradients.begin_step(1)
    with _Storages(stage) as storages:
        x, y, dy = _forward(stage, 0)
        held_by_forward = storages.bytes_alive()
        with gradients.deferred(0):
            torch.autograd.backward(y, dy)
        del y
        floats = LAYERS * (T * (H + QKV) + T * (HEADS * D + H) + T * (H + 2 * F) + T * (F + H) + 2 * H)  # x and dy; norms: dw
        floats += H if last else 0
        ids = T if first else 0
        outside = 0 if x is None else 2 * T * H  # x and its gradient are not the queue's
        assert storages.bytes_alive() == 8 * (floats + ids + (T * H if first else 0) + outside) < held_by_forward
        gradients.run(0)
        assert storages.bytes_alive() == 8 * (outside + (0 if last else T * H))  # dy is ours


def _gathers(split: bool) -> tuple[int, int]:
    """Gathers of saved inputs in B and in W, on two ranks with sequence parallelism."""
    stage = _stage(Grid.build(ParallelConfig(tensor_parallel=2), KV), False, False)
    gradients = WeightGradients([stage])
    _, y, dy = _forward(stage, 0)
    with (
        mock.patch.object(linear, "start_all_gather", wraps=linear.start_all_gather) as in_backward,
        mock.patch.object(weight_grad, "start_all_gather", wraps=weight_grad.start_all_gather) as in_queue,
    ):
        if split:
            with gradients.deferred(0):
                torch.autograd.backward(y, dy)
            assert in_queue.call_count == 0
            gradients.run(0)
        else:
            torch.autograd.backward(y, dy)
    return in_backward.call_count, in_queue.call_count


@pytest.mark.parametrize("split", [False, True])
def test_inputs_are_gathered_again_where_their_product_is_made(split: bool) -> None:
    columns = 2 * LAYERS
    assert run_ranks(2, _gathers, split) == [(0, columns) if split else (columns, 0)] * 2


# The queue


def test_one_communication_is_ahead_of_the_products_and_operands_are_let_go_of() -> None:
    gradients, log = WeightGradients(()), []
    operands: list[weakref.ref] = []

    def job(number: int) -> Callable[[], Callable[[], None]]:
        operand = torch.ones(1)
        operands.append(weakref.ref(operand))

        def start() -> Callable[[], None]:
            log.append(f"start {number}")
            return partial(finish, operand)

        def finish(_: Tensor) -> None:
            assert all(operands[done]() is None for done in range(number))
            log.append(f"finish {number}")

        return start

    with gradients.deferred("key"):
        assert all(gradients.put(job(number)) for number in range(3))
    assert not gradients.put(job(3)) and len(operands) == 4
    gradients.run("key")
    assert log == ["start 0", "start 1", "finish 0", "start 2", "finish 1", "finish 2"]


def test_what_was_put_off_must_have_been_made_before_the_next_step() -> None:
    gradients = WeightGradients(())
    with gradients.deferred((1, 2)):
        pass
    with pytest.raises(AssertionError, match=r"\(1, 2\)"):
        gradients.begin_step(1)
    gradients.run((1, 2))
    gradients.begin_step(1)


def test_what_was_put_off_must_have_been_made_at_the_end_of_the_step() -> None:
    gradients = WeightGradients(())
    gradients.begin_step(1)
    with gradients.deferred((1, 2)):
        pass
    with pytest.raises(AssertionError, match=r"\(1, 2\).* never made"):
        gradients.end_step()
    gradients.run((1, 2))
    gradients.end_step()


def test_a_parameter_gets_all_of_its_gradients_in_a_step_or_none() -> None:
    """Three micro-batches; the second layer is frozen, no loss depends on the third, the fourth has no buffer."""
    layers = [RowParallelLinear(name, 4, 4, Axis("tp"), torch.float64, CPU) for name in "abcd"]
    layers[1].weight.requires_grad_(False)
    for layer in layers[:3]:
        layer.weight.main_grad = torch.zeros(4, 4, dtype=torch.float64)  # type: ignore[attr-defined]
    gradients = WeightGradients(layers)

    def backward(seed: int) -> None:
        x = layers[0](_random(seed, 5, 4), False)
        layers[3](layers[1](x, False), False).sum().backward()

    for _ in range(2):
        gradients.begin_step(3)
        backward(0)
        backward(1)
        with pytest.raises(AssertionError, match=r"missing at the end of the step: 1 of 3 for a parameter of shape \(4, 4\)$"):
            gradients.end_step()
        backward(2)
        gradients.end_step()
    backward(3)
    with pytest.raises(AssertionError, match=r"-1 of 3"):
        gradients.end_step()


def test_a_weight_without_a_buffer_gets_its_gradient_in_b() -> None:
    """Autograd accumulates it, so it cannot come later."""
    layer = RowParallelLinear("o", 4, 3, Axis("tp"), torch.float64, CPU)
    gradients = WeightGradients([layer])
    x = _random(1, 5, 4)
    with gradients.deferred(0):
        layer(x, False).backward(_random(2, 5, 3))
    torch.testing.assert_close(layer.weight.grad, _random(2, 5, 3).t() @ x)


def test_layers_of_one_input_wait_only_if_all_have_buffers() -> None:
    layers = [ColumnParallelLinear(nn.Parameter(_random(seed, 3, 4)), Axis("tp")) for seed in range(2)]
    layers[0].weight.main_grad = torch.zeros(3, 4, dtype=torch.float64)  # type: ignore[attr-defined]
    gradients = WeightGradients(layers)
    gradients.begin_step(1)
    x = _random(5, 6, 4).requires_grad_()
    with gradients.deferred(0):
        sum(column_parallel(x, layers, False)).sum().backward()  # type: ignore[union-attr]
    gradients.run(0)
    for gradient in (layers[0].weight.main_grad, layers[1].weight.grad):
        assert gradient is not None
        torch.testing.assert_close(gradient, x.detach().sum(0).expand(3, 4))


def test_a_failed_backward_ends_the_deferral() -> None:
    gradients = WeightGradients(())
    with pytest.raises(RuntimeError, match="planted"), gradients.deferred(0):
        raise RuntimeError("planted")
    assert not gradients.put(lambda: lambda: None)


def test_the_last_gradient_is_reported_after_it_was_added() -> None:
    """Two layers share a weight, one is frozen, one has a weight of its own; two micro-batches."""
    shared, own, frozen = (nn.Parameter(_random(seed, 4, 4)) for seed in range(3))
    frozen.requires_grad_(False)
    layers = [ColumnParallelLinear(weight, Axis("tp")) for weight in (shared, own, frozen, shared)]
    for weight in (shared, own, frozen):
        weight.main_grad = torch.zeros(4, 4, dtype=torch.float64)  # type: ignore[attr-defined]
    gradients = WeightGradients(layers)
    seen: list[tuple[str, Tensor]] = []
    names = {shared: "shared", own: "own"}
    gradients.on_last = lambda weight: seen.append((names[weight], weight.main_grad.clone()))  # type: ignore[attr-defined]
    for _ in range(2):
        gradients.begin_step(2)
        for mb in range(2):
            with gradients.deferred(mb):
                x = _random(9 + mb, 3, 4)
                for layer in layers:
                    x = layer(x, False)
                x.sum().backward()
            assert not seen
        gradients.run(0)
        assert not seen
        gradients.run(1)
        assert [name for name, _ in seen] == ["own", "shared"]  # the first layer's backward is the last
        for name, weight in (("own", own), ("shared", shared)):
            assert torch.equal(dict(seen)[name], weight.main_grad)  # type: ignore[attr-defined]
        seen.clear()
    assert not frozen.main_grad.any()  # type: ignore[attr-defined]
