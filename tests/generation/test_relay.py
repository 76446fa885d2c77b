"""Generation on a grid, with the engine's own stages, is that of one process and of transformers: float64, many layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.config import ModelConfig
from megatron_llm.generation.generate import Sampling, generate
from megatron_llm.generation.relay import Relay
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine, build_model
from tests.families.cases import LLAMA, Case, make_folder
from tests.ranks import run_ranks
from tests.runs import config_of

PROMPTS = [[5, 17, 3], [99], [1, 2, 3, 4, 5, 6, 7], [130, 129]]
NEW = 10
MODELS = {
    "llama": {**LLAMA, "num_hidden_layers": 4},
    # Frequencies that go by the length: cached keys become outdated on the way.
    "dynamic": {
        **LLAMA, "num_hidden_layers": 5, "max_position_embeddings": 8, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "dp2": (2, {}),
    "pp2 zb_v": (2, {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
    "pp3": (3, {"pipeline_parallel": 3}),
    "tp2 pp2 interleaved": (
        4, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
    ),
    "tp2 dp2 without sequence parallel": (4, {"tensor_parallel": 2, "sequence_parallel": False}),
}  # fmt: skip
Texts = list[list[int]]


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Texts, Texts]:
    """A folder; greedy text, which is transformers' step by step without a cache; sampled text of one process."""
    path = tmp_path_factory.mktemp("model")
    hf = make_folder(Case("LlamaForCausalLM", MODELS[request.param]), path).double()
    folder = HFFolder(path)
    stage = build_model(ModelConfig(**folder.model_fields()), folder.source(), torch.float64, torch.device("cpu"))
    greedy, sampled = _texts(stage)
    for prompt, ids in zip(PROMPTS, greedy, strict=True):
        for count in range(NEW):
            with torch.no_grad():
                logits = hf(torch.tensor([prompt + ids[:count]]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == ids[count]
    return path, greedy, sampled


def _texts(model: Any) -> tuple[Texts, Texts]:
    greedy = generate(model, PROMPTS, max_new_tokens=NEW, sampling=Sampling())
    return greedy, generate(model, PROMPTS, max_new_tokens=NEW, sampling=Sampling(1.0, top_k=40, top_p=0.9), seed=3)


def _on_grid(path: Path, parallel: dict[str, Any]) -> tuple[Texts, Texts]:
    folder = HFFolder(path)
    model = ModelConfig(**folder.model_fields())
    config = config_of(model=model.model_dump(), parallel=parallel)
    grid = Grid.build(config.parallel, model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), folder.source())
    return _texts(Relay(grid, engine.stages, engine.schedule.placement))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_does_not_depend_on_the_layout(made: tuple[Path, Texts, Texts], layout: str) -> None:
    path, greedy, sampled = made
    world, parallel = LAYOUTS[layout]
    assert run_ranks(world, _on_grid, path, parallel) == [(greedy, sampled)] * world
    assert greedy != sampled
