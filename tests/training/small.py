"""A run of few steps on packed documents, for tests of schedules and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream, build_valid_streams
from megatron_llm.training.build import Engine
from megatron_llm.training.evaluation import evaluate
from megatron_llm.training.step import RunState, train_step
from tests.runs import Pieces, config_of, owned_weights

SMALL: dict[str, Any] = {
    "model": {
        "vocab_size": 37,  # no TP size divides it
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,  # no PP size divides it
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # attention that tells tokens apart
    },
    "training": {"sequence_length": 8, "global_batch_size": 6, "steps": 3, "seed": 3, "eval_rows": 5},
    "optimizer": {"lr": 1e-2, "grad_clip": 0.7},
    "lr_schedule": {"kind": "constant"},
    "precision": {"compute": "float64"},
    "device": "cpu",
}
LENGTHS = (3, 21, 1, 9, 33, 2, 5, 13, 1, 30, 7, 12, 17, 4)  # 158 tokens: 19 rows, 18 of which are trained on

LOOPED = ("interleaved", "breadth_first")
FOLDED = ("zb_v", "v_half", "v_min")


def small(data: Path, micro_batch_size: int = 1, tied: bool = False, **sections: dict[str, Any]) -> Config:
    """A run of three steps of six rows; `micro_batch_size` decides into how many micro-batches they fall."""
    sections["training"] = {"micro_batch_size": micro_batch_size, **sections.get("training", {})}
    sections["model"] = {"tie_word_embeddings": tied, **sections.get("model", {})}
    sets = {"train": [{"path": str(data)}], "valid": [{"path": str(data), "name": "valid"}]}
    return config_of(SMALL, data={"kind": "pretrain", "order": "file", **sets}, **sections)


def schedule(name: str, ranks: int, chunks: int = 2) -> dict[str, Any]:
    """The `parallel` section of a schedule; `chunks` is for those that take any number."""
    return {"pipeline_parallel": ranks, "pipeline_schedule": name, "virtual_stages": chunks if name in LOOPED else 1}


def run(engine: Engine, config: Config) -> tuple[list[tuple[float, float]], tuple[float, float], Pieces]:
    """Train and evaluate: (loss, gradient norm) of every step, validation sums, the weights owned at the end."""
    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(config.training.steps)]
    score = evaluate(engine, build_valid_streams(config)["valid"]).score
    return [(result.loss, result.grad_norm) for result in results], (score.loss, score.weight), owned_weights(engine)
