"""Training with every kernel in Triton is training with none, in any layout: losses, gradient norms, weights after some steps.

The kernels compute in float32, so float32 is what can be compared: to its rounding, not to the last bit. Without a GPU they are
interpreted.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from megatron_llm.ops.kernels import FUSED
from tests.decoders import DECODERS
from tests.ranks import run_ranks
from tests.runs import assemble, config_of, train
from tests.tiers import slow_among

pytest.importorskip("triton")
importlib.import_module("tests.ops.triton.interpreter").repair()  # now, before the rank pool is forked

TRITON = dict.fromkeys((*FUSED, "attention"), "triton")
STEPS = 2
SMALL: dict[str, dict[str, Any]] = {  # an interpreted program takes milliseconds
    "model": {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "training": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
    "precision": {"compute": "float32"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2 with a split backward": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_h1"}),
    "dp2": (2, {"bucket_size": 3000}),
}


def _same(world: int, sections: dict[str, Any]) -> None:
    sections = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL.keys() | sections.keys()}
    results = []
    for ranks, kernels in ((1, {}), (world, TRITON)):
        parallel = sections.get("parallel", {}) if ranks == world else {}
        config = config_of(**{**sections, "parallel": parallel}, kernels=kernels)
        ran = run_ranks(ranks, train, config, STEPS)
        results.append((ran[0][0], assemble([pieces for _, pieces in ran])))
    (expected_history, expected), (history, weights) = results
    for step, reference in zip(history, expected_history, strict=True):
        assert step[:2] == pytest.approx(reference[:2], rel=1e-4)
    for name, value in weights.items():
        error, size = (value - expected[name]).norm().item(), expected[name].norm().item()
        assert error <= 2e-4 * size + 1e-6 * value.numel() ** 0.5, (name, error, size)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name == "dp2")) for name in LAYOUTS])
def test_layouts(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    _same(world, {"parallel": parallel})


@pytest.mark.parametrize("name", slow_among(("falcon", "gemma2", "bloom"), DECODERS))
def test_decoders_under_recomputation(name: str) -> None:
    """With SGD: AdamW would make a step of what rounding leaves of gradients that are zero, as those of key biases."""
    _same(1, {"model": DECODERS[name], "training": {"recompute": "selective"}, "optimizer": {"name": "sgd", "lr": 0.01}})
