"""Generation against transformers: greedy ids, the cache, stop tokens, sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, generate, uniform
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
    places = uniform(3, range(20000), 5)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)
    counts = torch.bincount(Sampling(temperature=1.0).choose(logits, places), minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    assert set(Sampling(1.0, top_k=2).choose(logits, places).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.6).choose(logits, places).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.39).choose(logits, places).tolist()) == {3}
    cold = torch.bincount(Sampling(temperature=0.5).choose(logits, places), minlength=4) / 20000
    torch.testing.assert_close(cold, torch.tensor([1, 4, 9, 16.0]) / 30, atol=0.015, rtol=0)


def test_places_are_uniform_and_independent() -> None:
    """Between sequences, between places of one, and between seeds."""
    ways = (uniform(1, range(4000), 0), torch.cat([uniform(1, [7], place) for place in range(4000)]), uniform(2, range(4000), 0))
    for numbers in ways:
        assert numbers.min() >= 0 and numbers.max() < 1 and len(numbers.unique()) == 4000
        tenths = torch.bincount((numbers * 10).long(), minlength=10)
        assert (tenths - 400).abs().max() < 100  # five standard deviations
        assert torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1].abs() < 0.08
    assert torch.corrcoef(torch.stack(ways))[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.08


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[0.0, -1.0, 1.0, -torch.inf], [2.0, 2.0, 2.0, 2.0]])
    nearly_one = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    assert Sampling(1.0).choose(logits, torch.zeros(2, dtype=torch.float64)).tolist() == [2, 0]
    assert Sampling(1.0).choose(logits, nearly_one).tolist() == [1, 3]
    assert Sampling(1.0, top_k=2).choose(logits, nearly_one).tolist() == [0, 1]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[-20.0, 30.0, 29.0]])
    assert Sampling(temperature=1e-300).choose(logits, torch.tensor([0.99])).tolist() == [1]
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            Sampling(temperature)


def test_same_seed_same_text(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    runs = [generate(stage, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0), seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_batches_may_be_cut_anywhere(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    whole = generate(stage, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0), seed=4)
    parts = [
        generate(stage, [prompt], max_new_tokens=8, sampling=Sampling(1.0), seed=4, first=number)[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert whole == parts


def test_wrong_prompts_are_refused(models: tuple[LlamaForCausalLM, DecoderStage]) -> None:
    _, stage = models
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        greedy(stage, [[1], []], 2)
    with pytest.raises(ValueError, match="token id 131.*vocabulary has 131"):
        greedy(stage, [[131]], 2)
