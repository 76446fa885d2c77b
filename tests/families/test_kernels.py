"""Whole models of all sorts with every kernel in Triton, against transformers' class: what the reference path is held to.

Without a GPU the kernels are interpreted.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from megatron_llm.config import KernelsConfig, ModelConfig
from megatron_llm.hf.reader import HFFolder
from megatron_llm.ops.kernels import FUSED
from megatron_llm.training.build import build_model
from tests.families.cases import cases, make_folder
from tests.families.models import gradients_of_stage, logical_gradients, packed_batch, reference
from tests.tiers import slow_among

pytest.importorskip("triton")
importlib.import_module("tests.ops.triton.interpreter").repair()  # now, before the rank pool is forked

FEW = ("llama", "gemma2")
"""Between them: grouped queries, norms on both sides, soft caps, windows, weights counted from 1, gated GELU."""
OTHERS = (
    "llama-biases", "qwen3", "gemma3", "olmo2", "glm4", "cohere", "stablelm-parallel", "gpt-bigcode-multi-query", "gptj",
    "gpt-neox", "mpt", "falcon-7b", "falcon-rw", "opt-post-norm",
)  # fmt: skip
"""And: norms of heads and of all of them, interleaved and partial rotation, LayerNorm, attention beside the MLP, one key head,
ALiBi, also in bfloat16, learned positions, plain MLPs."""
SLOW = ("gemma3", "olmo2", "gpt-bigcode-multi-query", "gptj", "mpt", "falcon-7b")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = KernelsConfig(attention="triton", **dict.fromkeys(FUSED, "triton"))


@pytest.mark.parametrize("name", [*FEW, *slow_among(SLOW, OTHERS)])
def test_all_in_triton_equals_transformers(tmp_path: Path, name: str) -> None:
    hf = make_folder(cases()[name], tmp_path)
    folder = HFFolder(tmp_path)
    stage = build_model(ModelConfig(**folder.model_fields()), folder.source(), torch.float32, DEVICE, TRITON)
    batch = packed_batch(stage.model.vocab_size)
    expected_logits, expected_loss = reference(hf, batch)
    expected_loss.backward()
    batch = batch.to(DEVICE)
    torch.testing.assert_close(stage.logits(stage(None, batch)).cpu(), expected_logits, atol=1e-4, rtol=1e-4)
    loss = stage.loss(stage(None, batch), batch)
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected_loss, atol=0, rtol=1e-4)
    expected = logical_gradients(hf, folder, stage.model)
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for tensor, gradient in gradients_of_stage(stage).items():
        error = (gradient.cpu() - expected[tensor]).norm()
        assert error <= 1e-3 * max(float(expected[tensor].norm()), floor), tensor
