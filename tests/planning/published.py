"""Training speeds that others published, as configurations of ours. Used by the fit of the step-time model and its tests.

Llama-3: NVIDIA's dgxc-benchmarking, llama3.1/README_8b.md and README_70b.md (NeMo 24.09, bfloat16, H100, rows of 8,192 tokens),
in tokens/s per GPU. Megatron: the model table of Megatron-LM's README (megatron-core 0.8, bfloat16, H100, rows of 4,096,
vocabulary of 131,072, 48 data-parallel ranks), in TFLOP/s per GPU by its own formula, which counts attention as if it were not
causal. That table says sizes, not shapes: hidden size and layers are those that give the size with plain MLPs and untied heads.
Nor does it say the batch, which is taken to be the 1,152 rows of the same page's strong scaling of 177B (larger models had larger
batches, it says), or the schedule: 1F1B up to two
pipeline ranks, interleaved with four stages a rank beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_llm.config import Config, parse_config


@dataclass(frozen=True)
class Published:
    """A speed and what it was measured on: tokens per second and GPU."""

    name: str
    config: Config
    world: int
    tokens_per_second: float


def _config(model: dict[str, Any], parallel: dict[str, Any], length: int, batch: int) -> Config:
    return parse_config(
        {
            "model": model,
            "parallel": parallel,
            "data": {"kind": "synthetic"},
            "training": {"sequence_length": length, "micro_batch_size": 1, "global_batch_size": batch, "steps": 1},
            "optimizer": {"lr": 1e-4},
            "precision": {"compute": "bfloat16"},
        }
    )


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"vocab_size": 128_256, "num_key_value_heads": 8, **sizes}


def _gpt(hidden: int, layers: int) -> dict[str, Any]:
    heads = hidden // 128
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return {"vocab_size": 131_072, "num_attention_heads": heads, "num_key_value_heads": heads, "mlp_gated": False,
            "hidden_act": "gelu", **sizes}  # fmt: skip


def _megatron(name: str, hidden: int, layers: int, tp: int, pp: int, tflops: float) -> Published:
    length, vocabulary = 4096, 131_072
    loops = {"pipeline_schedule": "interleaved", "virtual_stages": 4} if pp > 2 else {}
    config = _config(_gpt(hidden, layers), {"tensor_parallel": tp, "pipeline_parallel": pp, **loops}, length, 1152)
    flops = 72 * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (12 * hidden * layers))
    return Published(f"Megatron {name}", config, 48 * tp * pp, tflops * 1e12 / flops)


_8B, _70B = _llama(4096, 14_336, 32, 32), _llama(8192, 28_672, 80, 64)
_CP, _SPLIT = {"context_parallel": 2}, {"context_parallel": 2, "tensor_parallel": 4, "pipeline_parallel": 4}
_LOOPED = {**_SPLIT, "pipeline_schedule": "interleaved", "virtual_stages": 5}

FITTED = [
    _megatron("16B", 6144, 32, 4, 1, 489.1),
    _megatron("70B", 8192, 84, 8, 2, 419.7),
]
PREDICTED = [
    Published("Llama-3 8B, 8 GPUs", _config(_8B, _CP, 8192, 128), 8, 10_153),
    Published("Llama-3 70B, 64 GPUs", _config(_70B, _LOOPED, 8192, 128 * 4), 64, 1_113),
    Published("Llama-3 8B, 128 GPUs", _config(_8B, _CP, 8192, 128 * 16), 128, 1_280_704 / 128),
    Published("Llama-3 70B, 256 GPUs", _config(_70B, _LOOPED, 8192, 128 * 4 * 4), 256, 283_399 / 256),
    _megatron("1.7B", 2048, 24, 1, 1, 408.8),
    _megatron("7.1B", 4096, 30, 2, 1, 465.9),
    _megatron("32B", 8192, 38, 8, 1, 459.6),
    _megatron("119B", 10_240, 92, 8, 4, 420.5),
    _megatron("177B", 12_288, 96, 8, 6, 432.8),
    _megatron("314B", 16_384, 96, 8, 8, 474.4),
    _megatron("462B", 18_432, 112, 8, 16, 459.9),
]
