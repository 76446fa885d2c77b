"""Bytes of activations that a pipeline stage holds for one micro-batch. Called by `planning/stages.py`.

From F to B, per layer, what autograd saves (tensors that several operations save count once; weights do not count):

    tensor                                    elements of the compute dtype        of at least float32
    input of the layer and of the MLP norm    2 * S * H
    reciprocal norms                                                               2 * S
    outputs of both norms                     2 * S * H
    q, k, v as projected (v is a view)        T * (N + 2 K) * D
    q and k, rotated                          T * (N + K) * D
    attention output, log-sum-exp             T * N * D                            T * N
    the same output with documents joined     T * N * D, only if several documents attend on their own
    gate and up; their product                T * 3 F

Besides, per stage: the rotary tables; on the first the ids; on the last what the final norm, the head and the loss save. It holds
for attention kernels that keep no score matrix, and for devices that compute in the compute dtype itself.

From B to W, per layer, the inputs and the output gradients of its four products:

    inputs                                    2 * S * H + T * N * D + T * F
    output gradients                          2 * T * H + T * (N + 2 K) * D + T * 2 F
    gradients of both norms                                                        2 * H

and those of the head and of the final norm on the last stage, the ids and the gradient of the embedding on the first.

T tokens of a micro-batch, S = T / t with sequence parallelism and else T; on one of t tensor-parallel ranks: N query heads,
K key/value heads of D channels, F intermediate size, V vocabulary; H hidden size.
"""

from __future__ import annotations

from megatron_llm.config import Config

IDS = 8  # bytes of an int64
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def compute_bytes(config: Config) -> int:
    """Bytes of an element in the compute dtype; `auto` is bfloat16 unless the run is on the CPU."""
    name = config.precision.compute
    return _BYTES[("float32" if config.device == "cpu" else "bfloat16") if name == "auto" else name]


def stage_bytes(config: Config, layers: int, first: bool, last: bool) -> tuple[float, float]:
    """(bytes from F to B, bytes from B to W) of one micro-batch on one rank, for a stage with that many layers.

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
    qkv, joined = t * (n + 2 * k) * d, t * n * d * training.document_isolation

    saved = layers * (size * (4 * s * h + qkv + t * (2 * n + k) * d + joined + 3 * t * f) + wide * (2 * s + t * n))
    saved += wide * t * d if layers else 0
    deferred = layers * (size * (2 * s * h + 2 * t * h + qkv + t * n * d + 3 * t * f) + wide * 2 * h)
    if first:
        saved += (IDS + (tp > 1)) * t  # over tp also which ids are not held here
        deferred += IDS * t + size * t * h
    if last:
        saved += size * (2 * s * h + t * v) + wide * (s + 2 * t) + IDS * t
        deferred += size * (s * h + t * v) + wide * h
    return saved, deferred
