"""FLOPs of training, the number that throughput is divided by. Called by `training/metrics.py`.

Counted causally: in a row of L tokens a query sees (L + 1) / 2 on average, and fewer in layers with a sliding window. Not counted
are recomputation (model FLOPs, not hardware FLOPs), norms, rotary embeddings, biases, activations and softmax, which are below
1 %, and copies of key/value heads where there are more tensor-parallel ranks.
"""

from __future__ import annotations

from megatron_llm.config import ModelConfig
from megatron_llm.models.split import layer_costs


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 per multiply-add of every matrix product and of the attention scores.

    Forward takes 2 FLOPs a multiply-add, and backward twice the forward: for both factors of a product.
    """
    embedding, layer, head = layer_costs(model, sequence_length)
    return 6.0 * (embedding + model.num_hidden_layers * layer + head)


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
