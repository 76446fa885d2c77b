"""Recomputation changes what is kept and what is run, and not one bit of any number."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.recompute import recomputed
from megatron_llm.models.regularization import Regularization
from megatron_llm.models.stages import parameters
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import TensorSource
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import _run_microbatches
from tests.decoders import DECODERS, AllRandom
from tests.ranks import run_ranks
from tests.runs import RECOMPUTE, config_of, stage_of, train
from tests.tiers import slow_one_in

# One primitive


class _Doubled(torch.autograd.Function):
    """Saves what it is given, behind what made it, as a projection does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * 2 * x


def test_inputs_are_kept_and_nothing_of_what_was_made() -> None:
    made: list[weakref.ref] = []

    def make(x: Tensor) -> Tensor:
        inner = x.sin()
        output = inner.exp()
        made.extend((weakref.ref(inner.untyped_storage()), weakref.ref(output.untyped_storage())))
        return output

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(_Doubled.apply(x.sin().exp()).sum(), x)[0]
    y = recomputed(True, make, _Doubled.apply, x)
    gc.collect()
    assert len(made) == 2 and [reference() for reference in made] == [None, None]
    for runs in (4, 6):  # a graph that is kept may run again
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(dx, expected)
        gc.collect()
        assert len(made) == runs and all(reference() is None for reference in made)


def test_nothing_is_recomputed_where_nothing_is_kept() -> None:
    runs = []

    def make(x: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        return x.exp()

    x = torch.zeros(2, requires_grad=True)
    with torch.no_grad():
        assert not recomputed(True, make, torch.neg, x).requires_grad
    recomputed(False, make, torch.square, x).sum().backward()
    assert runs == [False, True]


def test_what_saves_something_else_the_second_time_is_told() -> None:
    runs = []

    def make(x: Tensor) -> Tensor:
        runs.append(x)
        return x.exp() if len(runs) == 1 else x.exp().exp()

    y = recomputed(True, make, torch.neg, torch.zeros(2, requires_grad=True))
    with pytest.raises(AssertionError, match="saved 1 tensors first and now 2"):
        y.sum().backward()


# A stage


def _stage(config: Config, layers: range = range(3)) -> tuple[DecoderStage, WeightGradients, Tensor, Batch]:
    torch.manual_seed(0)
    stage = stage_of(config, layers)
    for parameter in stage.parameters():
        parameter.data.normal_()
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    queue = WeightGradients([stage])
    queue.begin_step(1)
    ids = torch.arange(12)
    batch = Batch(ids, ids, torch.ones(12), torch.cat((ids[:5], ids[:7])), (0, 5, 12))
    return stage, queue, torch.randn(12, config.model.hidden_size, requires_grad=True), batch


class _Counted(TorchDispatchMode):
    """How often products and attention run forward and backward, by short names."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if name in ("mm", "addmm", "bmm"):
            self.calls["products"] += 1
        elif name.startswith("_scaled_dot_product"):
            self.calls["attention backward" if name.endswith("backward") else "attention"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("setting", "products", "attention"),
    [
        ("full", 3 * 3, 3 * 2),  # three of four products a layer, and both documents' attention
        ("full, every second layer", 2 * 3, 2 * 2),
        ("selective", 0, 3 * 2),
        ("selective, every second layer", 0, 2 * 2),
        ("attention", 0, 3 * 2),
        ("norms", 0, 0),
        ("activation", 0, 0),
    ],
)
def test_backward_repeats_no_more_than_it_must(
    setting: str, products: int, attention: int, model: dict[str, Any] | None = None
) -> None:
    """Beyond an input gradient of each of four products, and what attention's backward takes; and W repeats nothing."""
    stage, queue, x, batch = _stage(config_of(model=model or {}, training=RECOMPUTE[setting]))
    with _Counted() as forward:
        y = stage(x, batch)
    with _Counted() as backward, queue.deferred("B"):
        y.sum().backward()
    with _Counted() as weights:
        queue.run("B")
    assert forward.calls == {"products": 3 * 4, "attention": 3 * 2}
    assert backward.calls - Counter({"products": 3 * 4, "attention backward": 3 * 2}) == +Counter(
        {"products": products, "attention": attention}
    )
    assert weights.calls == {"products": 3 * 4}


@pytest.mark.parametrize(
    ("setting", "products", "attention"),
    [("full", 3 * 2, 3 * 2), ("selective", 0, 3 * 2), ("attention", 0, 3 * 2), ("norms", 0, 0)],
)
@pytest.mark.parametrize("name", ["falcon", "neox"])
def test_backward_of_a_parallel_block_repeats_no_more(name: str, setting: str, products: int, attention: int) -> None:
    """The products behind attention and MLP are the last of the layer, so two of four are never run again."""
    test_backward_repeats_no_more_than_it_must(setting, products, attention, DECODERS[name])


@pytest.mark.parametrize("decoder", [None, "falcon", "neox", "gemma2", "gpt"])
@pytest.mark.parametrize("setting", RECOMPUTE)
def test_parameters_without_a_buffer_and_frozen_ones(setting: str, decoder: str | None) -> None:
    """Gradients that autograd accumulates are the same too; what asks for none gets none."""
    results = []
    for training in ({}, RECOMPUTE[setting]):
        stage, _, x, batch = _stage(config_of(model=DECODERS[decoder] if decoder else {}, training=training))
        for parameter in stage.parameters():
            del parameter.main_grad, parameter.weight_gradients
        frozen = [*stage.layers[1].parameters(), *stage.layers[2].mlp.up.parameters()]
        for parameter in frozen:
            parameter.requires_grad_(False)
        stage(x.requires_grad_(False), batch).square().sum().backward()
        results.append([parameter.grad for parameter in stage.parameters()])
    assert sum(gradient is None for gradient in results[0]) == len(frozen)
    for expected, gradient in zip(*results, strict=True):
        assert (expected is None) == (gradient is None)
        assert expected is None or torch.equal(expected, gradient)


# A run


def _numbers(config: Config, weights: TensorSource | None) -> list[Tensor]:
    """What a rank has to show: sums and gradients of a global batch, then losses, norms and weights of two steps."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), weights)
    rows, chosen = range(config.training.global_batch_size), Regularization.of(config)
    sums = _run_microbatches(engine, engine.schedule, build_train_stream(config), rows, regularization=chosen)
    gradients = [parameter.main_grad.clone() for parameter in parameters(engine.stages)]  # type: ignore[attr-defined]
    history, pieces = train(config, 2, weights)
    assert not any(skipped for *_, skipped in history)
    return [sums, *gradients, torch.tensor([line[:2] for line in history], dtype=torch.float64), *(piece[3] for piece in pieces)]


def _differences(
    compute: str, parallel: dict[str, Any], settings: list[str], decoder: str | None = None, noise: bool = False
) -> list[str]:
    """Those of the settings that change any bit on this rank. decoder: one of the others; a Llama by default."""
    regularization = {"hidden_dropout": 0.2, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3} if noise else {}
    model, weights = (DECODERS[decoder], AllRandom(5)) if decoder else ({}, None)

    def numbers(training: dict[str, Any]) -> list[Tensor]:
        training = {"sequence_length": 12 if decoder else 16, "regularization": regularization, **training}
        config = config_of(model=model, training=training, parallel=parallel, precision={"compute": compute})
        return _numbers(config, weights)

    expected = numbers({})
    assert all(tensor.isfinite().all() and tensor.any() for tensor in expected[1:])
    return [
        name for name in settings if not all(torch.equal(a, b) for a, b in zip(expected, numbers(RECOMPUTE[name]), strict=True))
    ]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 without sequence parallel": (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "pp2 zb_h1": (2, {"pipeline_parallel": 2, "pipeline_schedule": "zb_h1"}),
    "tp2 pp2 zb_v": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
}


SOME = ["full, every second layer", "selective"]


@pytest.mark.parametrize("compute", ["bfloat16", "float32", "float64"])
def test_not_one_bit_changes(compute: str) -> None:
    assert run_ranks(1, _differences, compute, {}, list(RECOMPUTE)) == [[]]


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        ("tp2", "bfloat16"),
        ("tp2 without sequence parallel", "float32"),
        ("pp2 zb_h1", "float64"),
        ("tp2 pp2 zb_v", "float32"),
    ],
)
def test_not_one_bit_changes_on_many_ranks(layout: str, compute: str) -> None:
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _differences, compute, parallel, SOME) == [[]] * world


@pytest.mark.parametrize("decoder", DECODERS)
def test_not_one_bit_of_other_decoders_changes(decoder: str) -> None:
    assert run_ranks(1, _differences, "float32", {}, list(RECOMPUTE), decoder) == [[]]


@pytest.mark.parametrize(
    ("decoder", "layout", "compute"),
    [
        ("falcon", "tp2 pp2 zb_v", "float32"),
        pytest.param("gemma2", "tp2", "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_not_one_bit_of_other_decoders_changes_on_many_ranks(decoder: str, layout: str, compute: str) -> None:
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _differences, compute, parallel, ["full", *SOME, "norms", "activation"], decoder) == [[]] * world


@pytest.mark.parametrize(
    ("decoder", "layout", "compute", "setting"),
    [
        (None, "tp2", "bfloat16", "full"),
        pytest.param("neox", "tp2 pp2 zb_v", "float32", "selective", marks=pytest.mark.slow),
        pytest.param(None, "tp2", "bfloat16", "selective", marks=pytest.mark.exhaustive),
        pytest.param("neox", "tp2 pp2 zb_v", "float32", "full", marks=pytest.mark.exhaustive),
        pytest.param("gemma2", "pp2 zb_h1", "float64", "full", marks=pytest.mark.slow),
    ],
)
def test_not_one_bit_of_noise_changes(decoder: str | None, layout: str, compute: str, setting: str) -> None:
    """Dropout is part of what full recomputation makes again, and behind what others do."""
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _differences, compute, parallel, [setting], decoder, True) == [[]] * world


@pytest.mark.parametrize(
    ("decoder", "setting", "layout", "compute"),
    slow_one_in(29, product(DECODERS, RECOMPUTE, LAYOUTS, ["bfloat16", "float64"])),
)
def test_not_one_bit_of_other_decoders_changes_in_any_layout_and_setting(
    decoder: str, setting: str, layout: str, compute: str
) -> None:
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _differences, compute, parallel, [setting], decoder) == [[]] * world


@pytest.mark.parametrize(
    ("setting", "compute", "layout"), slow_one_in(11, product(RECOMPUTE, ["bfloat16", "float32", "float64"], LAYOUTS))
)
def test_not_one_bit_changes_in_any_layout_and_setting(setting: str, compute: str, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _differences, compute, parallel, [setting]) == [[]] * world


def test_the_rows_hold_several_documents() -> None:
    assert len(build_train_stream(config_of()).batch([0, 1]).cu_seqlens) > 3
