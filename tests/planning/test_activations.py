"""The bytes that a stage is said to hold are those that autograd and the queue of weight gradients really hold.

Held is what is alive and was not before; what autograd keeps in C++ a hook makes visible to Python.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from megatron_llm.config import Config, KernelsConfig
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.heads import head_problem
from megatron_llm.models.recompute import Recompute, _Recomputation
from megatron_llm.models.regularization import Regularization
from megatron_llm.models.stages import add_adapters
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.kernels import Kernels
from megatron_llm.optim.rules import freeze
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.planning.activations import StageBytes, packed_attention, stage_bytes
from megatron_llm.planning.stages import Speed, stage_costs
from tests.decoders import DECODERS
from tests.ranks import run_ranks
from tests.runs import RECOMPUTE, config_of
from tests.tiers import slow_among, slow_one_in

MEMORY = Path(__file__).parents[2] / "docs/memory.md"
LENGTH = 24
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STAGES = {  # layers, first, last
    "one layer": (range(1), False, False),
    "three layers": (range(3), False, False),
    "embedding": (range(0), True, False),
    "embedding and layers": (range(2), True, False),
    "head": (range(0), False, True),
    "layers and head": (range(1, 3), False, True),
    "everything": (range(2), True, True),
}


def _config(
    tp: int,
    dtype: str,
    isolated: bool,
    sequence_parallel: bool,
    model: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
    **training: Any,
) -> Config:
    adapters = {"peft": peft} if peft else {}
    return config_of(
        **adapters,
        model=model or {"num_hidden_layers": 3},
        parallel={"tensor_parallel": tp, "sequence_parallel": sequence_parallel},
        training={"sequence_length": LENGTH, "micro_batch_size": 2, "document_isolation": isolated, **training},
        precision={"compute": dtype},
    )


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of every storage that some tensors have between them."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]


def _alive() -> dict[int, int]:
    """Storages of all tensors."""
    gc.collect()
    return _storages(_tensors())


def _added(before: dict[int, int], expected: int) -> int:
    """Bytes alive that were not before; looks again if they are more than expected, as gloo's threads let go of a buffer late."""
    deadline = time.monotonic() + 10
    while True:
        added = sum(size for pointer, size in _alive().items() if pointer not in before)
        if added <= expected or time.monotonic() > deadline:
            return added
        time.sleep(0.02)


def _measured(config: Config, layers: range, first: bool, last: bool) -> StageBytes:
    """Bytes alive after F and after B that were not before F, and the most that a recomputation brings back, on this rank."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    dtype, tokens = DTYPES[config.precision.compute], config.training.micro_batch_size * config.training.sequence_length
    stage = DecoderStage(
        config.model,
        grid,
        layers,
        first=first,
        last=last,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=Kernels.choose(config.kernels, torch.device("cpu"), dtype),
        recompute=Recompute.of(config.training),
    )
    if config.peft is not None:
        add_adapters([stage], config.model, config.peft)
    freeze(stage.parameters(), config.optimizer, config.peft is not None)
    for parameter in stage.parameters():
        parameter.data.normal_()
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    queue = WeightGradients([stage])
    queue.begin_step(1)
    chosen = Regularization.of(config)
    bounds = (0, 11, LENGTH, tokens) if config.training.document_isolation else tuple(range(0, tokens + 1, LENGTH))
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)])
    rows = tokens // (grid.tp.size if stage.sequence_parallel else 1)

    def forward() -> tuple[Tensor | None, Tensor]:
        ids = torch.randint(0, config.model.vocab_size, (tokens,))
        batch = Batch(ids, ids, torch.ones(tokens, dtype=dtype), positions, bounds, rows=(0, 1))
        x = None if first else torch.randn(rows, config.model.hidden_size, dtype=dtype, requires_grad=True)
        y = stage(x, batch, regularization=chosen)
        return x, stage.objective(y, batch, chosen)[0] if last else y

    expected = stage_bytes(config, layers, first, last, rank=grid.tp.rank)
    before = _alive()
    with saved_tensors_hooks(Tensor.detach, Tensor.detach):  # not run backward: hooks hide the parameters' attributes
        x, y = forward()
    edge = get_gradient_edge(y)
    del x, y
    kept = _added(before, expected.forward)
    del edge
    assert _added(before, 0) == 0, "F leaves something behind"

    again = [0]
    make_again = _Recomputation._make_again

    def watched(recomputation: _Recomputation) -> None:
        tensors = _tensors()  # held, so that what is made gets memory of its own
        known = _storages(tensors)
        make_again(recomputation)
        made = _storages([*recomputation.made.values()])
        again.append(sum(size for pointer, size in made.items() if pointer not in known))

    x, y = forward()
    with queue.deferred("B"), mock.patch.object(_Recomputation, "_make_again", watched):
        torch.autograd.backward(y, None if last else torch.randn_like(y))
    del x, y
    waiting = _added(before, expected.backward)
    queue.run("B")
    assert _added(before, 0) == 0, "W leaves something behind"
    return StageBytes(kept, waiting, max(again))


def _measured_stages(config: Config, names: list[str]) -> list[StageBytes]:
    gc.freeze()  # what the process held before is not looked at again and again
    try:
        return [_measured(config, *STAGES[name]) for name in names]
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("isolated", [False, True], ids=["one document", "two documents"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_that_are_held(dtype: str, isolated: bool) -> None:
    config = _config(1, dtype, isolated, True)
    (measured,) = run_ranks(1, _measured_stages, config, list(STAGES))
    assert dict(zip(STAGES, measured, strict=True)) == {name: stage_bytes(config, *stage) for name, stage in STAGES.items()}


class _Packed(torch.autograd.Function):
    """Keeps what attention by packed kernels keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
        out_TND, log_sum_exp_NT = q_TND.new_ones(q_TND.shape), q_TND.new_zeros(q_TND.shape[1], q_TND.shape[0])
        ctx.save_for_backward(q_TND, k_SKD, v_SKD, out_TND, log_sum_exp_NT)
        return out_TND

    @staticmethod
    def backward(ctx: Any, dout_TND: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_ones(x.shape) for x in ctx.saved_tensors[:3])


def _measured_packed(config: Config, names: list[str]) -> list[StageBytes]:
    module = ModuleType("megatron_llm.ops.triton.attention")
    module.tiles = lambda *_: None  # type: ignore[attr-defined]
    module.flash_attention = lambda q, k, v, *_: _Packed.apply(q, k, v)  # type: ignore[attr-defined]
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # not by mock.patch.dict, which forgets what is imported meanwhile
    try:
        return _measured_stages(config, names)
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before


@pytest.mark.parametrize("isolated", [False, True], ids=["one document", "two documents"])
@pytest.mark.parametrize("decoder", [None, "gemma2", "bloom", "cohere2"])
def test_bytes_of_packed_attention(decoder: str | None, isolated: bool) -> None:
    """No matrices, whatever is done to scores, and no output of its own for a document."""
    config = _config(1, "float32", isolated, True, DECODERS[decoder] if decoder else None)
    config = config.model_copy(update={"kernels": KernelsConfig(attention="triton")})
    names = ["three layers", "everything"]
    (measured,) = run_ranks(1, _measured_packed, config, names)
    assert measured == [stage_bytes(config, *STAGES[name]) for name in names]
    alike = decoder is None and not isolated  # of what remains, both keep the same
    plain = config.model_copy(update={"kernels": KernelsConfig()})
    assert (measured == [stage_bytes(plain, *STAGES[name]) for name in names]) is alike


def test_attention_is_packed_on_gpus() -> None:
    for device, compute, attention, packed in (
        ("cuda", "bfloat16", "auto", True),
        ("auto", "auto", "auto", True),
        ("cuda", "float64", "auto", False),
        ("cpu", "bfloat16", "auto", False),
        ("cuda", "bfloat16", "cudnn", False),
        ("cuda", "bfloat16", "sdpa", False),
        ("cuda", "bfloat16", "varlen", True),
        ("cpu", "float32", "triton", True),
    ):
        config = config_of(precision={"compute": compute}, kernels={"attention": attention})
        assert packed_attention(config.model_copy(update={"device": device})) is packed, (device, compute, attention)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("tp", [2, 4])
def test_bytes_of_a_tensor_parallel_rank(tp: int, sequence_parallel: bool) -> None:
    """4 ranks are more than key/value heads: each holds a copy."""
    config, names = _config(tp, "float32", False, sequence_parallel), ["one layer", "embedding and layers", "layers and head"]
    for measured in run_ranks(tp, _measured_stages, config, names):
        assert measured == [stage_bytes(config, *STAGES[name]) for name in names]


@pytest.mark.parametrize(("tp", "dtype", "isolated"), [(1, "float64", True), (2, "float32", False)])
@pytest.mark.parametrize("setting", RECOMPUTE)
def test_bytes_with_recomputation(setting: str, tp: int, dtype: str, isolated: bool) -> None:
    config = _config(tp, dtype, isolated, True, **RECOMPUTE[setting])
    names = ["one layer", "three layers", "layers and head"]
    for measured in run_ranks(tp, _measured_stages, config, names):
        assert measured == [stage_bytes(config, *STAGES[name]) for name in names]


@pytest.mark.parametrize(
    ("tp", "model", "setting", "targets"),
    [
        (1, None, "none", ["attention.q", "layers.[1-2].*.down", "layers.0.mlp.gate"]),
        (2, "cohere2", "selective", ["all-linear"]),
        pytest.param(2, "qwen3", "full", ["all-linear"], marks=pytest.mark.slow),
        pytest.param(2, "cohere2", "full", ["attention.q", "layers.[1-2].*.down", "layers.0.mlp.gate"], marks=pytest.mark.slow),
    ],
)
def test_bytes_of_adapters(tp: int, model: str | None, setting: str, targets: list[str]) -> None:
    fields = _variant(model) if model else None
    config = _config(tp, "float32", False, True, fields, {"rank": 5, "targets": targets}, recompute=setting)
    names = ["one layer", "three layers"]
    for rank, measured in enumerate(run_ranks(tp, _measured_stages, config, names)):
        assert measured == [stage_bytes(config, *STAGES[name], rank) for name in names]


REGULARIZATION = {"hidden_dropout": 0.2, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.mark.parametrize(("tp", "decoder", "setting"), [(1, "neox", "full"), (1, "gemma2", None), (2, None, "selective")])
def test_noise_and_penalties_hold_nothing(tp: int, decoder: str | None, setting: str | None) -> None:
    """The same bytes as without, of which the formulas know nothing."""
    training = {**(RECOMPUTE[setting] if setting else {}), "regularization": REGULARIZATION}
    config = _config(tp, "float64", False, True, VARIANTS[decoder] if decoder else None, **training)
    _assert_bytes(tp, config, ["one layer", "embedding and layers", "layers and head"])


def _variant(decoder: str, **fields: Any) -> dict[str, Any]:
    return {**DECODERS[decoder], "max_position_embeddings": LENGTH, **fields}


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: _variant(name) for name in DECODERS},
    "falcon, ALiBi": _variant("falcon", position_embedding="alibi", alibi_scaled=True, parallel_block="none"),
    "neox, gated": _variant("neox", mlp_gated=True, norm_bias=False, embedding_norm=True),
    "olmo2, post-norms, windows in all layers": _variant("olmo2", norm_placement="residual", sliding_window=LENGTH // 2),
    "olmo2, both norms, nowhere rotated": _variant("olmo2", norm_placement="both", nope_layers=[0, 1, 2], qk_norm="head"),
    "opt, multiplied, no final norm": _variant("opt", embedding_multiplier=2.0, final_norm=False, logit_multiplier=0.5),
    "opt, gated": _variant("opt", mlp_gated=True, qk_norm="head", qk_norm_bias=True),
    "gemma2, normalized heads": _variant("gemma2", qk_norm="head", final_logit_softcapping=None),
    "gemma3": _variant("gemma2", attn_logit_softcapping=None, rope_local_theta=100.0, qk_norm="head"),
    "windows as long as rows": _variant("gemma2", attn_logit_softcapping=None, sliding_window=LENGTH),
    "cohere2, plain relu": _variant(
        "cohere2", mlp_gated=False, hidden_act="relu", norm_weight=False, qk_norm="none", qk_norm_bias=False
    ),
    "gpt, scaled by layer, windows": _variant("gpt", sliding_window=4, clip_qkv=None),
}
BY_LENGTH = {  # what they keep depends on how long documents are
    name for name, model in VARIANTS.items() if {"sliding_window", "attn_logit_softcapping"} & model.keys()
    or model.get("position_embedding") == "alibi"
}  # fmt: skip


def _assert_bytes(tp: int, config: Config, names: list[str], exact: bool = True) -> None:
    for rank, measured in enumerate(run_ranks(tp, _measured_stages, config, names)):
        for name, held in zip(names, measured, strict=True):
            said = stage_bytes(config, *STAGES[name], rank=rank)
            if exact:
                assert held == said, (rank, name)
            else:
                assert all(a <= b for a, b in zip(held, said, strict=True)), (rank, name)
            assert all(a <= b for a, b in zip(said, stage_bytes(config, *STAGES[name]), strict=True)), (rank, name)


@pytest.mark.parametrize(("decoder", "setting"), [(None, "none"), (None, "norms"), ("gemma2", "full"), ("opt", "none")])
def test_fused_norms_hold_the_same(decoder: str | None, setting: str) -> None:
    """A sum is kept where its norm's input is; its terms are not."""
    pytest.importorskip("triton")
    model = VARIANTS[decoder] if decoder else {"num_hidden_layers": 3}
    config = _config(1, "float32", False, True, model, **RECOMPUTE.get(setting, {}))
    fused = config.model_copy(update={"kernels": KernelsConfig(norm="triton")})
    _assert_bytes(1, fused, ["one layer", "embedding and layers", "layers and head"])


@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_other_decoders(variant: str, isolated: bool) -> None:
    config = _config(1, "float64" if isolated else "float32", isolated, True, VARIANTS[variant])
    names = ["one layer", "embedding and layers", "layers and head", "embedding", "head"]
    _assert_bytes(1, config, names, exact=not (isolated and variant in BY_LENGTH))


@pytest.mark.parametrize("setting", ["none", "selective"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"nope_layers": [0, 1, 2]}, {"clip_qkv": 0.5}, {"qk_norm": "head"}], ids=str)
def test_bytes_of_explicit_attention(fields: dict[str, Any], rows: int, setting: str) -> None:
    """One row attends as a view of what was projected, several as copies."""
    model = _variant("gemma2", sliding_window=None, layer_types=["full_attention"] * 3, **fields)
    _assert_bytes(1, _config(1, "float32", False, True, model, micro_batch_size=rows, recompute=setting), ["three layers"])


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, True), (2, False), (3, True)])
@pytest.mark.parametrize(
    "decoder", ["falcon", "olmo2", *slow_among(("gemma2", "bloom"), sorted(DECODERS.keys() - {"falcon", "olmo2"}))]
)
def test_bytes_of_other_decoders_on_uneven_ranks(decoder: str, tp: int, sequence_parallel: bool) -> None:
    config = _config(tp, "float32", False, sequence_parallel, VARIANTS[decoder])
    if head_problem(config.model, tp) is None:
        _assert_bytes(tp, config, ["embedding and layers", "layers and head"])


FAST = ("full", "selective")


@pytest.mark.parametrize(
    ("variant", "setting"),
    [*product(VARIANTS, FAST), *slow_one_in(4, product(VARIANTS, [name for name in RECOMPUTE if name not in FAST]))],
)
def test_bytes_of_other_decoders_with_recomputation(variant: str, setting: str) -> None:
    config = _config(1, "float32", False, True, VARIANTS[variant], **RECOMPUTE[setting])
    _assert_bytes(1, config, ["one layer", "three layers"])


@pytest.mark.parametrize("decoder", ["falcon", "neox", "olmo2", "gemma2"])
def test_bytes_of_other_decoders_with_recomputation_on_two_ranks(decoder: str) -> None:
    for setting in ("full", "selective"):
        _assert_bytes(2, _config(2, "float64", False, True, VARIANTS[decoder], **RECOMPUTE[setting]), ["three layers"])


def test_the_documented_bytes_are_those_of_the_formulas() -> None:
    """Per token and layer, on average over an even and an odd one; without the rotary tables, which all layers of a stage share,
    and without the gradients of the norms."""
    model = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    text = MEMORY.read_text()
    rows = re.findall(
        r"^\| `(none|selective|full)`(.*) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", MEMORY.read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    steps, tokens = [], 8192
    for mode, more, kept, again, _ in rows:
        training: dict[str, Any] = {"recompute": mode, "sequence_length": tokens, "micro_batch_size": 1}
        if modules := re.search(r"\[(.*)\]", more):
            training["recompute_modules"] = modules[1].split(", ")
        if every := re.search(r"recompute_every: (\d)", more):
            training["recompute_every"] = int(every[1])
        config = config_of(model=model, training=training, precision={"compute": "bfloat16"})
        costs = stage_costs(config, (0,), Speed.uniform(1.0, 1.0))
        steps.append(costs.forward[0] + costs.backward[0] + costs.weight[0])
        two = stage_bytes(config, range(2), False, False)
        tables, norms = 4 * tokens * config.model.head_dim, 2 * 4 * config.model.hidden_size
        assert (two.forward - tables) / 2 / tokens == int(kept.replace(",", "")), (mode, more)
        assert two.again / tokens == int(again.replace(",", "")), (mode, more)
        assert f"{(two.backward / 2 - norms) / tokens:,.0f} bytes a token and layer from B to W" in text
    assert [f"{step / steps[0]:.3f}" for step in steps] == [row[-1] for row in rows]
