"""Every family against transformers' class: logits and gradients of packed documents, alone and in layouts; generation.

transformers sees each document alone, so the same tests prove that packing isolates documents under rotary embeddings of every
kind, ALiBi, learned positions and sliding windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, generate
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.names import logical_tensors
from megatron_llm.ops.batch import Batch
from tests.families.cases import LLAMA, Case, cases, make_folder
from tests.families.models import (
    DOCUMENTS,
    assembled,
    gradients_of_layout,
    gradients_of_stage,
    logical_gradients,
    our_model,
    packed_batch,
    reference,
)
from tests.ranks import run_ranks

CASES = cases()
IN_LAYOUTS = [name for name, case in CASES.items() if case.layouts]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": False}),
}


def _assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-3 of each tensor's norm; some true gradients are zero, as of key biases without rotation, hence the floor."""
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).norm())
        assert error <= 1e-3 * max(float(gradient.norm()), floor), (name, error, float(gradient.norm()))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, name: str) -> None:
    hf = make_folder(CASES[name], tmp_path)
    folder = HFFolder(tmp_path)
    stage = our_model(folder)
    held = {part.name: part.shape for parameter in stage.parameters() for part in parameter.shard.parts}
    assert held == dict(logical_tensors(stage.model))
    batch = packed_batch(stage.model.vocab_size)
    expected_logits, expected_loss = reference(hf, batch)
    assert expected_logits.std() > 0.05  # a model that says something
    expected_loss.backward()
    torch.testing.assert_close(stage.logits(stage(None, batch)), expected_logits, atol=1e-4, rtol=1e-4)
    loss = stage.loss(stage(None, batch), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-4)
    _assert_close(gradients_of_stage(stage), logical_gradients(hf, folder, stage.model))


@pytest.mark.parametrize(
    ("name", "layout"),
    [  # each slowly in one of the layouts, by turns
        pytest.param(name, layout, marks=pytest.mark.exhaustive if (number + place) % 2 else pytest.mark.slow)
        for number, name in enumerate(IN_LAYOUTS)
        for place, layout in enumerate(LAYOUTS)
    ],
)
def test_layouts_equal_transformers(tmp_path: Path, name: str, layout: str) -> None:
    hf = make_folder(CASES[name], tmp_path)
    folder = HFFolder(tmp_path)
    model = ModelConfig(**folder.model_fields())
    _, expected_loss = reference(hf, packed_batch(model.vocab_size))
    expected_loss.backward()
    world, parallel = LAYOUTS[layout]
    results = run_ranks(world, gradients_of_layout, str(tmp_path), parallel)
    assert sum(loss for loss, _ in results) == pytest.approx(expected_loss.item(), rel=1e-4)
    _assert_close(assembled(results), logical_gradients(hf, folder, model))


@torch.no_grad()
@pytest.mark.parametrize("name", IN_LAYOUTS)
def test_greedy_generation_in_a_batch_equals_transformers(tmp_path: Path, name: str) -> None:
    """Prompts of different lengths, packed; with what follows longer than windows and contexts. transformers has no cache."""
    hf = make_folder(CASES[name], tmp_path)
    stage = our_model(HFFolder(tmp_path))
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, stage.model.vocab_size, (n,), generator=generator).tolist() for n in (3, 11, 1)]
    new = 9
    ours = generate(stage, prompts, max_new_tokens=new, sampling=Sampling())
    for prompt, ids in zip(prompts, ours, strict=True):
        assert len(ids) == new
        # Step by step: some rotary frequencies depend on the length so far.
        texts = [torch.tensor([prompt + ids[:count]]) for count in range(new)]
        logits = torch.stack([hf(text, use_cache=False).logits[0, -1] for text in texts])
        best = logits.max(-1).values
        chosen = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert (best - chosen).max() < 1e-3  # near ties may fall either way
        assert (logits.topk(2).values.diff(dim=-1).abs() > 1e-3).float().mean() > 0.5  # most choices are clear


def test_a_stage_without_boundaries_attends_across_documents(tmp_path: Path) -> None:
    """The other tests would notice if documents were not isolated: without boundaries the logits differ."""
    make_folder(Case("LlamaForCausalLM", LLAMA), tmp_path)
    stage = our_model(HFFolder(tmp_path))
    batch = packed_batch(stage.model.vocab_size)
    merged = Batch(batch.tokens_T, batch.labels_T, batch.weights_T, batch.positions_T, (0, sum(DOCUMENTS)))
    assert (stage(None, batch) - stage(None, merged)).abs().max() > 1e-3
