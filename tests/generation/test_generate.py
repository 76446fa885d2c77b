"""Generation against transformers: greedy ids, the cache, stop tokens, sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, generate
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.training.build import build_model
from tests.families.cases import LLAMA, Case, make_folder

PROMPTS = [[5, 17, 3], [99], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, DecoderStage]:
    path: Path = tmp_path_factory.mktemp("llama")
    hf = make_folder(Case("LlamaForCausalLM", LLAMA), path)
    folder = HFFolder(path)
    return hf, build_model(ModelConfig(**folder.model_fields()), folder.source(), torch.float32, torch.device("cpu"))


def greedy(stage: DecoderStage, prompts: list[list[int]], count: int, stop: frozenset[int] = frozenset()) -> list[list[int]]:
    return generate(stage, prompts, max_new_tokens=count, sampling=Sampling(), stop_ids=stop)


def test_greedy_equals_transformers(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    hf, stage = models
    outputs = greedy(stage, PROMPTS, 12)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output == expected[0, len(prompt) :].tolist()


def test_stop_ids_end_each_sequence_by_itself(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    free = greedy(stage, PROMPTS, 12)
    stop = free[0][3]
    cut = greedy(stage, PROMPTS, 12, frozenset({stop}))
    for before, after in zip(free, cut, strict=True):
        assert after == (before[: before.index(stop) + 1] if stop in before else before)
    assert len(cut[0]) <= 4


def test_sampling_follows_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)
    counts = torch.bincount(Sampling(temperature=1.0).choose(logits, generator), minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    assert set(Sampling(1.0, top_k=2).choose(logits, generator).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.6).choose(logits, generator).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.39).choose(logits, generator).tolist()) == {3}
    cold = torch.bincount(Sampling(temperature=0.5).choose(logits, generator), minlength=4) / 20000
    torch.testing.assert_close(cold, torch.tensor([1, 4, 9, 16.0]) / 30, atol=0.015, rtol=0)


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[-20.0, 30.0, 29.0]])
    assert Sampling(temperature=1e-300).choose(logits, torch.Generator()).tolist() == [1]
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            Sampling(temperature)


def test_same_seed_same_text(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    runs = [generate(stage, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0), seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_wrong_prompts_are_refused(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        greedy(stage, [[1], []], 2)
    with pytest.raises(ValueError, match="token id 131.*vocabulary has 131"):
        greedy(stage, [[131]], 2)
