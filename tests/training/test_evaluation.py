"""Scores of validation sets against transformers' whole logits and grouping by brute force, in every layout, in float64."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_llm.config import Config, ModelConfig
from megatron_llm.data.indexed import NOT_TRAINED, ROLES
from megatron_llm.data.stream import build_valid_streams
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.evaluation import Evaluation, Score, evaluate
from tests.families.cases import LLAMA, Case, make_folder, make_model
from tests.ranks import run_ranks
from tests.runs import config_of

LENGTHS = (7, 16, 3, 12, 9, 16, 5)  # of conversations, in rows of 16
MODEL = Case("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 4})
Expected = dict[str, tuple[float, float, int, int]]


@functools.cache
def _made() -> tuple[Path, list[tuple[np.ndarray, np.ndarray]]]:
    """A folder with a model and a chat set, and the ids and role bytes of the set's conversations."""
    folder = Path(tempfile.mkdtemp())
    make_folder(MODEL, folder / "hf")
    rng = np.random.default_rng(5)
    conversations = []
    with IndexedWriter(folder / "chat", np.uint16, roles=True) as writer:
        for length in LENGTHS:
            roles = np.repeat(rng.choice([*ROLES.values(), ROLES["assistant"] | NOT_TRAINED], length), 2)[:length].astype(
                np.uint8
            )
            roles[-1] = ROLES["assistant"]  # a conversation with nothing to learn is left out
            conversations.append((rng.integers(0, LLAMA["vocab_size"], length), roles))
            writer.add_document(*conversations[-1])
    return folder, conversations


def _config(parallel: dict[str, Any], micro_batch_size: int) -> Config:
    folder, _ = _made()
    valid = [{"path": str(folder / "chat"), "name": "talk"}, {"path": str(folder / "chat"), "name": "text", "kind": "pretrain"}]
    return config_of(
        model=ModelConfig(**HFFolder(folder / "hf").model_fields()).model_dump(),
        data={"kind": "chat", "packing": "in_order", "train": valid[:1], "valid": valid},
        training={"sequence_length": 16, "micro_batch_size": micro_batch_size, "eval_rows": 50},
        parallel=parallel,
    )


def _evaluate(config: Config, hf: Path) -> dict[str, Evaluation]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), HFFolder(hf).source(config.model))
    found = {}
    for name, stream in build_valid_streams(config).items():
        parts: list[float] = []
        found[name] = evaluate(engine, stream, parts.append)
        assert parts == sorted(parts) and parts[-1:] == ([1.0] if 0 in engine.stages else [])
    return found


@functools.cache
def _expected() -> Expected:
    """(loss sum, weight, hits, tokens) by group: every conversation alone in transformers, token by token."""
    hf = make_model(MODEL).double()
    groups: Expected = defaultdict(lambda: (0.0, 0.0, 0, 0))
    for ids, roles in _made()[1]:
        with torch.no_grad():
            logits = hf(torch.from_numpy(ids)[None], use_cache=False).logits[0]
        for place in range(len(ids) - 1):
            label, byte = int(ids[place + 1]), int(roles[place + 1])
            loss = float(logits[place].logsumexp(-1) - logits[place, label])
            hit = int(logits[place].argmax()) == label
            names = [name for name, number in ROLES.items() if number == byte & 7 and number]
            names += ["trained"] if byte == ROLES["assistant"] else []
            for name in names:
                old = groups[name]
                groups[name] = (old[0] + loss, old[1] + 1, old[2] + hit, old[3] + 1)
    return dict(groups)


@functools.cache
def _single(name: str) -> float:
    (found,) = run_ranks(1, _evaluate, _config({}, 2), _made()[0] / "hf")
    return {"trained": found["talk"].score, **found["talk"].roles}[name].loss


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "single": (1, 1, {}),
    "tp2": (2, 1, {"tensor_parallel": 2}),
    "tp6, copied key heads": (6, 1, {"tensor_parallel": 6, "sequence_parallel": False}),
    "dp2": (2, 2, {}),
    "zb_v": (2, 1, {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
    "tp2 pp2 interleaved": (
        4, 1, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_whole_logits_by_role(layout: str) -> None:
    world, size, parallel = LAYOUTS[layout]
    expected = _expected()
    results = run_ranks(world, _evaluate, _config(parallel, size), _made()[0] / "hf")
    assert all(result == results[0] for result in results)
    found = results[0]["talk"]
    scores = {"trained": found.score, **found.roles}
    assert scores.keys() == expected.keys() == {"trained", "system", "user", "assistant", "tool"}
    for name, score in scores.items():
        loss, *counts = expected[name]
        assert [score.weight, score.hits, score.tokens] == counts, name
        assert score.loss == pytest.approx(loss, rel=1e-7), name  # transformers has rotary frequencies of float32
        assert score.loss == pytest.approx(_single(name), rel=1e-13), name
    assert sum(score.hits for score in found.roles.values()), "some labels are the most likely tokens"
    assert results[0]["text"].score.tokens > found.score.tokens


def test_metrics_have_the_names_and_values_that_docs_give() -> None:
    found = Evaluation(Score(6.0, 3.0, 1, 4), {"user": Score(2.0, 2.0, 2, 2)})
    assert found.metrics("talk") == {
        "valid_loss/talk": 2.0, "valid_perplexity/talk": math.exp(2), "valid_accuracy/talk": 0.25,
        "valid_loss/talk/user": 1.0, "valid_perplexity/talk/user": math.e, "valid_accuracy/talk/user": 1.0,
    }  # fmt: skip
    assert (Score(6.0, 3.0, 1, 4) + Score(1.0, 1.0, 1, 1)).metrics()["valid_accuracy"] == 0.4
    assert str(found) == "2.0000, perplexity 7.389, accuracy 25.0% (user 1.0000)"
    assert Score(1000.0, 1.0, 0, 1).metrics()["valid_perplexity"] == math.inf
    assert Score().metrics("a") == {"valid_loss/a": None, "valid_perplexity/a": None, "valid_accuracy/a": None}
