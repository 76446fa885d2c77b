"""FLOPs of training, the number that throughput is divided by. Called by `training/metrics.py`.

Counted causally: a query attends on average to half of a row. Recomputation is not counted (model FLOPs, not hardware
FLOPs), nor are norms, rotary embeddings and softmax, which are below 1 %.
"""

from __future__ import annotations

from megatron_llm.config import ModelConfig


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 per weight of every matrix product, and the attention scores."""
    hidden, dim = model.hidden_size, model.head_dim
    attention = hidden * dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    layer = attention + 3 * hidden * model.intermediate_size
    weights = model.num_hidden_layers * layer + hidden * model.vocab_size
    # q k^T and p v: 2 * 2 * length * heads * dim FLOPs forward without the causal mask, half of it with; x3 for training.
    scores = 6 * model.num_hidden_layers * model.num_attention_heads * dim * sequence_length
    return 6.0 * weights + scores


# Dense bfloat16 peaks in FLOP/s from the vendors' data sheets, by a part of the device name, most specific first.
_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU, None where it is not known (then no MFU is reported)."""
    return next((peak for name, peak in _PEAKS if name in device_name), None)
