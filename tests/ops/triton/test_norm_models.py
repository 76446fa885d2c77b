"""Layers of every sort of model with norms in Triton against the same with torch's, and which operators they run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.recompute import Recompute
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.kernels import Kernels
from megatron_llm.parallel.grid import Grid
from tests.decoders import DECODERS
from tests.ops.triton.common import DEVICE
from tests.runs import RECOMPUTE, config_of

TOKENS = 12
MODELS: dict[str, tuple[dict[str, Any], Counter[str]]] = {  # and what one layer runs forward
    "llama": ({}, Counter(norm=1, add_norm=1)),
    "gemma2": (DECODERS["gemma2"], Counter(norm=3, add_norm=1)),
    "falcon": (DECODERS["falcon"], Counter(norm=1)),
    "neox": (DECODERS["neox"], Counter(norm=2)),
    "olmo": (DECODERS["olmo"], Counter(norm=3, add_norm=1)),  # queries and keys with a weight each
    "olmo2": (DECODERS["olmo2"], Counter(norm=2)),  # all heads of queries and keys together: not in Triton
    "cohere2": (DECODERS["cohere2"], Counter(norm=3)),
    "qwen3": (DECODERS["qwen3"], Counter(norm=3, add_norm=1)),
    "gpt": (DECODERS["gpt"], Counter(add_norm=2)),
    "starcoder": (DECODERS["starcoder"], Counter(norm=3, add_norm=1)),
}


class _Operators(TorchDispatchMode):
    """How often norms run, and sums of two tensors of hidden states."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.hidden = hidden

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron_llm":
            self.calls[func._opname] += 1
        elif func._opname in ("add", "add_") and all(
            isinstance(x, Tensor) and x.shape == (TOKENS, self.hidden) for x in args[:2]
        ):
            self.calls["sum"] += 1
        return func(*args, **(kwargs or {}))


def _run(
    model: dict[str, Any], kernel: str, setting: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Counter[str], Counter[str]]:
    """(output, gradients of the input and of all parameters of a layer; operators forward; operators backward)."""
    config = config_of(model=model, training=RECOMPUTE[setting] if setting else {})
    stage = DecoderStage(
        config.model, Grid.single(), range(1), first=False, last=False, sequence_parallel=False, dtype=dtype, device=DEVICE,
        kernels=Kernels(norm=kernel), recompute=Recompute.of(config.training),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
    ids = torch.arange(TOKENS)
    batch = Batch(ids, ids, torch.ones(TOKENS), torch.cat((ids[:5], ids[:7])), (0, 5, TOKENS))
    x, dy = (torch.randn(TOKENS, config.model.hidden_size, generator=generator).to(DEVICE, dtype) for _ in range(2))
    with _Operators(config.model.hidden_size) as forward:
        y = stage(x.requires_grad_(), batch)
    with _Operators(config.model.hidden_size) as backward:
        y.backward(dy)
    assert x.grad is not None and all(parameter.grad is None for parameter in stage.parameters())
    gradients = [parameter.main_grad for parameter in stage.parameters()]  # type: ignore[attr-defined]
    return [y.detach(), x.grad, *gradients], forward.calls, backward.calls


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_that_of_torch(name: str) -> None:
    """And its fused additions are fused: forward, and that of the residual's gradient, which "gpt" has none of."""
    model, expected = MODELS[name]
    reference, torchs_forward, torchs_backward = _run(model, "torch")
    results, forward, backward = _run(model, "triton")
    for actual, wanted in zip(results, reference, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    assert torchs_forward.keys() == {"sum"} and torchs_backward.keys() <= {"sum"}
    assert forward == expected + Counter(sum=torchs_forward["sum"] - expected["add_norm"])
    fused = 0 if name == "gpt" else expected["add_norm"]
    assert backward == Counter(norm_backward=expected.total()) + Counter(sum=torchs_backward["sum"] - fused)


@pytest.mark.parametrize("setting", ["full", "norms", "selective"])
@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_recomputation_changes_no_bit(name: str, setting: str) -> None:
    """A norm that is made again is not one with the addition, whose terms would have to be kept."""
    model, _ = MODELS[name]
    plain, _, _ = _run(model, "triton")
    again, forward, backward = _run(model, "triton", setting)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    alone = name == "llama" and setting != "full"
    assert forward["add_norm"] == (2 if name == "gpt" else 0 if alone else 1)
    assert forward["norm"] + forward["add_norm"] == 2 and backward["norm_backward"] == 2
