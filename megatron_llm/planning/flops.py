"""FLOPs of training, the number that throughput is divided by. Called by `training/metrics.py`.

Counted causally: in a row of L tokens a query sees (L + 1) / 2 on average, and fewer in layers with a sliding window. Not counted
are recomputation (model FLOPs, not hardware FLOPs), norms, rotary embeddings, biases, activations and softmax, which are below
1 %, and copies of key/value heads where there are more tensor-parallel ranks.
"""

from __future__ import annotations

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
