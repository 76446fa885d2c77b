"""FLOPs of training, the number that throughput is divided by. Called by `training/metrics.py`.

Counted causally: in a row of L tokens a query sees (L + 1) / 2 on average, and fewer in layers with a sliding window. Not counted
are recomputation (model FLOPs, not hardware FLOPs), norms, rotary embeddings, biases, activations and softmax, which are below
1 %, and copies of key/value heads where there are more tensor-parallel ranks.
"""

from __future__ import annotations

import re

from megatron_llm.config import ModelConfig, PeftConfig
from megatron_llm.models.lora import adapted_layers
from megatron_llm.models.names import logical_tensors
from megatron_llm.models.split import layer_costs, layer_products


def model_flops_per_token(model: ModelConfig, sequence_length: int, peft: PeftConfig | None = None) -> float:
    """FLOPs of forward and backward per token: 6 per multiply-add of every matrix product and of the attention scores.

    Forward takes 2 FLOPs a multiply-add, and backward twice the forward: for both factors of a product. A matrix that is frozen
    beside adapters takes one of them, and the adapters, [R, I] and [O, R], are two products more. (What `optimizer.rules` freeze
    or thaw is not looked at.)
    """
    embedding, layer, head = layer_costs(model, sequence_length)
    flops = 6.0 * (embedding + model.num_hidden_layers * layer + head)
    if peft is None:
        return flops
    products = layer_products(model, model.num_attention_heads, model.num_key_value_heads, model.intermediate_size)
    shapes = dict(logical_tensors(model))
    adapters = peft.rank * sum(sum(shapes[f"{name}.weight"]) for name in adapted_layers(model, peft))
    return flops - 2.0 * (model.num_hidden_layers * products + head) + 6.0 * adapters


# Dense bfloat16 peaks in FLOP/s with sums in float32, from the vendor's data sheets and white papers (which give some
# with sparsity: twice these), by whole words of the device's name: the first that is in it. `hardware.py` takes its own here.
PEAKS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name in CUDA; None where it is not known, or is a part of one (MIG)."""
    words = re.split(r"[\s_-]+", device_name)
    if "MIG" in words or "Laptop" in words:
        return None
    return next((peak for name, peak in PEAKS.items() if f" {name} " in f" {' '.join(words)} "), None)
