"""Every family on a GPU: float32 against transformers on the CPU, bfloat16 against that, beside transformers in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, generate
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.ops.batch import Batch
from megatron_llm.training.build import build_model
from tests.decoders import DECODERS, AllRandom
from tests.families.cases import cases, make_folder
from tests.families.models import gradients_of_stage, logical_gradients, packed_batch, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CODEGEN = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)  # before, heads had to be a multiple of 4 there
CASES = {name: case for name, case in cases().items() if case.layouts and (CODEGEN or not name.startswith("codegen"))}
GPU = torch.device("cuda")


def _on_gpu(folder: HFFolder, dtype: torch.dtype) -> DecoderStage:
    return build_model(ModelConfig(**folder.model_fields()), folder.source(), dtype, GPU)


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_transformers_on_the_cpu(tmp_path: Path, name: str) -> None:
    hf = make_folder(CASES[name], tmp_path)
    folder = HFFolder(tmp_path)
    stage = _on_gpu(folder, torch.float32)
    batch = packed_batch(stage.model.vocab_size)
    expected_logits, expected_loss = reference(hf, batch)
    expected_loss.backward()
    on_gpu = batch.to(GPU)
    torch.testing.assert_close(stage.logits(stage(None, on_gpu)).cpu(), expected_logits, atol=1e-4, rtol=1e-4)
    stage.loss(stage(None, on_gpu), on_gpu).backward()
    expected = logical_gradients(hf, folder, stage.model)
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for tensor, gradient in gradients_of_stage(stage).items():
        error = (gradient.cpu() - expected[tensor]).norm()
        assert error <= 1e-3 * max(float(expected[tensor].norm()), floor), tensor


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_near_as_transformers_is(tmp_path: Path, name: str) -> None:
    hf = make_folder(CASES[name], tmp_path)
    folder = HFFolder(tmp_path)
    batch = packed_batch(ModelConfig(**folder.model_fields()).vocab_size)
    exact, _ = reference(hf, batch)
    stage = _on_gpu(folder, torch.bfloat16)
    ours = stage.logits(stage(None, batch.to(GPU))).float().cpu()
    parameters_in_bfloat16 = hf.to(GPU)
    for parameter in parameters_in_bfloat16.parameters():
        parameter.data = parameter.data.bfloat16()
    theirs, _ = reference(parameters_in_bfloat16, batch.to(GPU))
    error, other = (ours - exact).norm(), (theirs.float().cpu() - exact).norm()
    assert error < max(1.5 * other, 1e-2 * exact.norm()), (float(error), float(other), float(exact.norm()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-7b", "bloom", "gpt2", "mistral"])
def test_greedy_generation_equals_the_cpu(tmp_path: Path, name: str) -> None:
    make_folder(CASES[name], tmp_path)
    folder = HFFolder(tmp_path)
    model, outputs = ModelConfig(**folder.model_fields()), []
    for device in (torch.device("cpu"), GPU):
        stage = build_model(model, folder.source(), torch.float64, device)
        outputs.append(generate(stage, [[5, 6, 7], [8], list(range(3, 14))], max_new_tokens=8, sampling=Sampling()))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("name", ["by length", *DECODERS])
def test_the_host_never_waits_in_forward_and_backward(name: str) -> None:
    """Documents of several lengths, as of frequencies that go by it."""
    by_length = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
    model = ModelConfig(**DECODERS["olmo2"], rope_scaling=by_length) if name == "by length" else ModelConfig(**DECODERS[name])
    stage = build_model(model, AllRandom(5), torch.bfloat16, GPU)
    tokens = torch.arange(12, device=GPU)
    batch = Batch(tokens, tokens, torch.ones(12, device=GPU), torch.cat([torch.arange(3), torch.arange(9)]).to(GPU), (0, 3, 12))
    stage.loss(stage(None, batch), batch).backward()  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.loss(stage(None, batch), batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
