"""Bytes of activations that a pipeline stage holds for one micro-batch. Called by `planning/stages.py`.

From F to B, per layer, what autograd saves (tensors that several operations save count once; weights do not count), and the
setting of recompute_modules with which it is made again instead. Full recomputation keeps the input of the layer only.

    tensor                                    elements of the compute dtype        of at least float32     made again
    input of the layer and of the MLP norm    2 * S * H
    reciprocal norms                                                               2 * S                   norms
    outputs of both norms                     2 * S * H                                                    norms
    q, k, v as projected (v is a view)        T * (N + 2 K) * D
    q and k, rotated                          T * (N + K) * D                                              attention
    attention output, log-sum-exp             T * N * D                            T * N                   attention
    the same output with documents joined     T * N * D, only if several documents attend on their own     attention
    gate and up                               T * 2 F
    their product                             T * F                                                        activation

What is made again comes back in B: one layer at a time with full recomputation, else one norm, one attention or one product.

Besides, per stage: the rotary tables; on the first the ids; on the last what the final norm, the head and the loss save. It holds
for attention kernels that keep no score matrix, and for devices that compute in the compute dtype itself.

From B to W, per layer and however recomputed, the inputs and the output gradients of its four products:

    inputs                                    2 * S * H + T * N * D + T * F
    output gradients                          2 * T * H + T * (N + 2 K) * D + T * 2 F
    gradients of both norms                                                        2 * H

and those of the head and of the final norm on the last stage, the ids and the gradient of the embedding on the first.

T tokens of a micro-batch, S = T / t with sequence parallelism and else T; on one of t tensor-parallel ranks: N query heads,
K key/value heads of D channels, F intermediate size, V vocabulary; H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_llm.config import Config
from megatron_llm.models.recompute import Recompute

IDS = 8  # bytes of an int64
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def compute_bytes(config: Config) -> int:
    """Bytes of an element in the compute dtype; `auto` is bfloat16 unless the run is on the CPU."""
    name = config.precision.compute
    return _BYTES[("float32" if config.device == "cpu" else "bfloat16") if name == "auto" else name]


class StageBytes(NamedTuple):
    """Bytes of one micro-batch on one rank.

    Attributes:
        forward: held from F to B. backward: held from B to W.
        again: the most that recomputation brings back at once during B, besides.
    """

    forward: float
    backward: float
    again: float


def stage_bytes(config: Config, layers: range, first: bool, last: bool) -> StageBytes:
    """What a stage of those layers holds; which layers are recomputed depends on their index in the whole model.

    Documents are taken to attend on their own wherever the configuration isolates them, which holds the most.
    """
    model, training, tp = config.model, config.training, config.parallel.tensor_parallel
    size = compute_bytes(config)
    wide = max(size, 4)
    t = training.micro_batch_size * training.sequence_length
    s = t / tp if config.parallel.sequence_parallel else t
    h, d, f = model.hidden_size, model.head_dim, model.intermediate_size / tp
    n, k = model.num_attention_heads / tp, max(1.0, model.num_key_value_heads / tp)
    v = -(-model.vocab_size // tp)
    qkv, outputs = t * (n + 2 * k) * d, t * n * d * (1 + training.document_isolation)

    norm = size * s * h + wide * s
    parts = {"norms": 2 * norm, "attention": size * (t * (n + k) * d + outputs) + wide * t * n, "activation": size * t * f}
    whole = size * (2 * s * h + qkv + 2 * t * f) + sum(parts.values())
    saved = again = 0.0
    for layer in layers:
        chosen = Recompute.of(training).at(layer)
        dropped = whole - size * s * h if "layer" in chosen else sum(parts[name] for name in chosen)
        saved += whole - dropped
        at_once = [dropped] if "layer" in chosen else [norm if name == "norms" else parts[name] for name in chosen]
        again = max(again, *at_once, 0.0)
    saved += wide * t * d if layers else 0
    deferred = len(layers) * (size * (2 * s * h + 2 * t * h + qkv + t * n * d + 3 * t * f) + wide * 2 * h)
    if first:
        saved += (IDS + (tp > 1)) * t  # over tp also which ids are not held here
        deferred += IDS * t + size * t * h
    if last:
        saved += size * (2 * s * h + t * v) + wide * (s + 2 * t) + IDS * t
        deferred += size * (s * h + t * v) + wide * h
    return StageBytes(saved, deferred, again)
