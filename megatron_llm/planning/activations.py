"""Bytes of activations that a pipeline stage holds for one micro-batch. Called by `planning/stages.py`.

From F to B, per layer, what autograd saves (tensors that several operations save count once; weights do not count), and the
setting of recompute_modules with which it is made again instead. Full recomputation keeps the input of the layer only, and
that of a norm behind the MLP. What a projection alone keeps, for the gradient of its weight, falls away beside adapters where it
has none: a normalized input, attention's output (joined, or explicit), the product. (So does the input of a layer without norms
before it; that is not subtracted.)

    tensor                                    elements of the compute dtype        of at least float32     made again
    input of the layer; of the MLP's part     2 * S * H, side by side S * H
    norms before attention and MLP            S * H each                           S, or 2 S, each         norms
    norms behind attention and MLP            S * H each                           S, or 2 S, each
    q, k, v as projected (the three are       T * (N + 2 K) * D
    views, and rotated in place)
    the same, clipped                         T * (N + 2 K) * D                                            attention
    norms of q and k                                                               T * (N + K), twice that, attention
                                                                                   or of all heads 2 T
    q and k, normalized                       T * (N + K) * D                                              attention
    attention output, log-sum-exp             T * N * D                            T * N                   attention
    the same output with documents joined     T * N * D, only if several documents attend on their own     attention
                                              and attention is not packed
    inputs of a gated MLP's product           T * 2 F
    input of a plain MLP's activation         T * F, unless that is relu
    what either makes of them                 T * F                                                        activation
    an adapter's product with its A           T * R

Rotation is in place, in what was projected or in what clipping or norms have made, and keeps nothing but the tables.
A norm keeps the reciprocal deviation of a token, LayerNorm its mean too; a norm before keeps its output (its input is the
layer's), one behind its input. relu is the one activation whose backward reads its result: recomputing it exchanges the result
for the input. With `attn_logit_softcapping` attention that is not packed is explicit, and keeps instead, from "q and k" down to
"documents joined", and mostly not q, k and v as projected (where no norm nor clipping needs them),

    q, k and v for every query head                                                3 T * N * D             attention
    (q may be the one that was projected, which is kept then, all of it: where documents or rows attend one by one in at least
    float32)
    tanh and softmax of the scores                                                 2 T * N * L             attention
    the mask                                  L * L bytes                                                  attention
    attention output                          T * N * D                                                    attention

Dropout and noise keep nothing: they are made again from counters (`ops/noise.py`). Neither do the loss and its penalties.

What is made again comes back in B: one layer at a time with full recomputation, else one norm, one attention or one product;
attention and product at once where they are side by side.

Attention is packed (`ops/attention_packed.py`) where `kernels.attention` names one of its backends, or is auto on a GPU that does
not compute in float64.

Besides, per stage: the rotary tables, also those of layers with a window where they differ; unless attention is packed, what is
added to the scores of ALiBi (N * L * L) or of a sliding window shorter than rows (L * L), once for all layers that are alike. On
the first stage the ids, the positions if they are learned, and the input of a norm behind the embedding; on the last what the
final norm saves, and the gradient of the head's input, S * H, and of its bias, V of at least float32, which F makes
(`parallel/head.py`).

It holds for devices that compute in the compute dtype itself, and for attention kernels that keep no score matrix and no copy of
what is added to scores (torch's memory-efficient one keeps one if L is no multiple of 16).

From B to W, per layer and however recomputed, the inputs and the output gradients of its four products:

    inputs                                    2 * S * H (one norm side by side: S * H) + T * N * D + T * F
    output gradients                          2 * T * H (side by side T * H) + T * (N + 2 K) * D + T * 2 F (plain: T * F)
    gradients of norms and biases                                                  as many as they have here

and the gradients of the final norm and of the head's bias on the last stage, the ids and the gradient of the embedding on the
first. Beside adapters the weights themselves wait for nothing, and what waits is, of the layers that have one,

    inputs and output gradients               as above, and 2 * T * R for each adapter

T tokens of a micro-batch in rows of L, S = T / t with sequence parallelism and else T; on one of t tensor-parallel ranks: N query
heads, K key/value heads of D channels, F intermediate size, V vocabulary; H hidden size; R rank of an adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from megatron_llm.config import Config
from megatron_llm.models.lora import KINDS, adapted_layers
from megatron_llm.models.names import norm_names
from megatron_llm.models.recompute import Recompute
from megatron_llm.ops.attention_packed import LIBRARIES
from megatron_llm.planning.share import Share

_QKV, _UP = ("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")
IDS = 8  # bytes of an int64
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def compute_bytes(config: Config) -> int:
    """Bytes of an element in the compute dtype; `auto` is bfloat16 unless the run is on the CPU."""
    name = config.precision.compute
    return _BYTES[("float32" if config.device == "cpu" else "bfloat16") if name == "auto" else name]


def packed_attention(config: Config) -> bool:
    """Whether attention runs on one of `ops/attention_packed.py`; on a GPU, unless the device is said to be a CPU."""
    chosen = config.kernels.attention
    if chosen == "auto":
        return config.device != "cpu" and config.precision.compute != "float64"
    return chosen == "triton" or chosen in LIBRARIES


class StageBytes(NamedTuple):
    """Bytes of one micro-batch on one rank.

    Attributes:
        forward: held from F to B. backward: held from B to W.
        again: the most that recomputation brings back at once during B, besides.
    """

    forward: float
    backward: float
    again: float


def stage_bytes(config: Config, layers: range, first: bool, last: bool, rank: int = 0) -> StageBytes:
    """What a stage of those layers holds; which layers are recomputed depends on their index in the whole model.

    Documents are taken to attend on their own wherever the configuration isolates them, and to be as long as a row where length
    matters: both hold the most. rank: of the tensor-parallel ones; none needs more than the first.
    """
    return _Stage(config, rank).bytes(layers, first, last)


def all_stage_bytes(config: Config, layers: Sequence[range]) -> list[StageBytes]:
    """What every stage of a model holds, from the first, on the first tensor-parallel rank."""
    stage = _Stage(config, 0)
    return [stage.bytes(held, number == 0, number == len(layers) - 1) for number, held in enumerate(layers)]


class _Stage:
    """The sizes that the table at the top of this file is written in."""

    def __init__(self, config: Config, rank: int):
        self.model, self.training, tp = config.model, config.training, config.parallel.tensor_parallel
        self.size = compute_bytes(config)
        self.wide = max(self.size, 4)
        self.several = tp > 1
        self.t = self.training.micro_batch_size * self.training.sequence_length
        self.s = self.t / tp if config.parallel.sequence_parallel else self.t
        self.h, self.d = self.model.hidden_size, self.model.head_dim
        self.n, self.k, self.f, self.v = Share.of(config, rank)
        self.qkv = self.t * (self.n + 2 * self.k) * self.d
        self.center = self.model.norm == "layer_norm"
        self.side_by_side = self.model.parallel_block != "none"
        self.peft = config.peft
        self.adapted = set(adapted_layers(config.model, config.peft)) if config.peft else set[str]()
        self.packed = packed_attention(config)
        self.explicit = self.model.attn_logit_softcapping is not None and not self.packed
        self.before, self.after = (len(names) for names in norm_names(self.model))
        self.normalized = self.size * self.s * self.h + self.wide * self.s * (
            1 + self.center
        )  # a tensor that a norm keeps, and statistics

    def bytes(self, layers: range, first: bool, last: bool) -> StageBytes:
        recompute = Recompute.of(self.training)
        parts = [recompute.at(layer) for layer in layers]
        alike = Counter((layer if self.adapted else 0, chosen) for layer, chosen in zip(layers, parts, strict=True))
        saved = sum(number * self._kept(*kind) for kind, number in alike.items())
        again = max((self._again(*kind) for kind in alike), default=0.0)
        saved += self._tables(layers, any(chosen & {"layer", "attention"} for chosen in parts)) + self._masks(layers)
        deferred = sum(self._operands if self.peft is None else self._adapter_operands(layer) for layer in layers)
        if first:
            saved += self._embedding_kept()
            deferred += self._embedding_operands() if self.peft is None else 0.0
        if last:
            saved += self._head_kept()
            if not (layers or self.model.final_norm):
                saved += self.size * self.s * self.h  # the stage's input, which nothing else keeps
            deferred += self._head_operands() if self.peft is None else 0.0
        return StageBytes(saved, deferred, again)

    # From F to B

    def _kept(self, layer: int, recomputed: frozenset[str]) -> float:
        """By a layer."""
        stream = self.size * self.s * self.h
        if "layer" in recomputed:
            last = ("attention.o", "mlp.down") if self.side_by_side else ("mlp.down",)
            return stream + (self.normalized if self.after else 0.0) + self._low_rank(layer, *last)
        kept = self._low_rank(layer) + stream * (1 if self.side_by_side else 2) + self.after * self.normalized
        if "norms" not in recomputed:
            readers = [_QKV, _UP] if self.before == 2 else [_QKV + _UP] * self.before
            kept += self.before * self.normalized - stream * sum(not self._reads(layer, *kinds) for kinds in readers)
        if "attention" in recomputed or self.model.clip_qkv is not None or self._viewed:
            kept += self.size * self.qkv
        if "attention" not in recomputed:
            kept += self._attention(layer)
        matrices = 2 if self.model.mlp_gated else 0 if self._reads_result and "activation" not in recomputed else 1
        product = 0.0 if "activation" in recomputed else self._product(layer)
        return kept + self.size * self.t * self.f * matrices + product

    def _low_rank(self, layer: int, *of: str) -> float:
        """The products with the A of those linear layers of a layer, or of all, that have an adapter."""
        if self.peft is None:
            return 0.0
        return float(self.size * self.t * self.peft.rank * sum(f"layers.{layer}.{kind}" in self.adapted for kind in of or KINDS))

    def _reads(self, layer: int, *kinds: str) -> bool:
        """Whether the gradient of a weight, or of an adapter, needs the input of a projection; kinds: of what it projects."""
        return self.peft is None or any(f"layers.{layer}.{kind}" in self.adapted for kind in kinds)

    def _product(self, layer: int) -> float:
        """What the activation makes, if anything needs it."""
        return self.size * self.t * self.f if self._reads_result or self._reads(layer, "mlp.down") else 0.0

    def _again(self, layer: int, recomputed: frozenset[str]) -> float:
        """What recomputation of a layer brings back at once, at most."""
        if "layer" in recomputed:
            return self._kept(layer, frozenset()) - self._kept(layer, recomputed)
        attention = self._attention(layer) if "attention" in recomputed else 0.0
        product = self._product(layer) if "activation" in recomputed else 0.0
        norm = self.normalized if "norms" in recomputed and self.before else 0.0
        return max(norm, attention + product if self.side_by_side else max(attention, product))

    @cached_property
    def _reads_result(self) -> bool:
        """Whether the activation keeps its result and not its input."""
        return self.model.hidden_act == "relu" and not self.model.mlp_gated

    def _rotates(self, layer: int) -> bool:
        return self.model.position_embedding == "rope" and layer not in self.model.nope_layers

    @cached_property
    def _viewed(self) -> bool:
        """Whether views of q, k, v as they come into a layer's attention are kept."""
        return not self.explicit or self.model.qk_norm != "none" or self._explicit_view

    @cached_property
    def _explicit_view(self) -> bool:
        """Whether explicit attention keeps a view of q as projected, and not a copy or what norms and clipping make of it."""
        one_by_one = self.training.document_isolation or self.training.micro_batch_size == 1
        altered = self.model.qk_norm != "none" or self.model.clip_qkv is not None
        return self.explicit and one_by_one and not altered and self.size == self.wide

    def _attention(self, layer: int) -> float:
        """Between the projections on either side."""
        t, n, k, d, size, wide = self.t, self.n, self.k, self.d, self.size, self.wide
        model, length = self.model, self.training.sequence_length
        read = self._reads(layer, "attention.o")
        kept = 0.0
        if model.clip_qkv is not None and self._viewed:
            kept += size * self.qkv
        if model.qk_norm != "none":
            kept += wide * t * (2 if model.qk_norm == "full" else (n + k) * (1 + self.center))
        if self.explicit:
            kept += wide * t * n * ((2 if self._explicit_view else 3) * d + 2 * length)
            return kept + self._square() + read * size * t * n * d
        if model.qk_norm != "none":
            kept += size * t * (n + k) * d
        joined = read and self.training.document_isolation and not self.packed
        return kept + size * t * n * d * (1 + joined) + wide * t * n

    def _square(self) -> int:
        """Elements of the masks of all lengths of documents."""
        length = self.training.sequence_length
        return length * (self.t if self.training.document_isolation else length)

    def _tables(self, layers: range, context: bool) -> float:
        """Rotary ones. context: whether recomputation keeps all that there are."""
        model = self.model
        if model.position_embedding != "rope":
            return 0.0
        local = model.rope_local_theta is not None
        used = {local and model.window(layer) is not None for layer in layers if self._rotates(layer)}
        if context:
            used = {False, local}
        return len(used) * self.wide * self.t * model.rotary_dim

    def _masks(self, layers: range) -> float:
        """What is added to scores."""
        model, length = self.model, self.training.sequence_length
        alibi = model.position_embedding == "alibi"
        windows = [model.window(layer) for layer in layers]
        scales = [model.scale(layer) if model.alibi_scaled and alibi else None for layer in layers]
        kinds = {
            (window if window is not None and window < length else None, scale)
            for window, scale in zip(windows, scales, strict=True)
        }
        if self.explicit or self.packed:
            return 0.0
        count = sum(alibi or window is not None for window, _ in kinds)
        return count * self.size * self._square() * (self.n if alibi else 1)

    def _embedding_kept(self) -> float:
        kept: float = (IDS + self.several) * self.t  # over tp also which ids are not held here
        if self.model.position_embedding == "learned":
            kept += IDS * self.s
        return kept + (self.normalized if self.model.embedding_norm else 0.0)

    def _head_kept(self) -> float:
        """The gradient of its input, made in F, and of its bias."""
        kept = self.size * self.s * self.h
        if self.model.head_bias and self.peft is None:
            kept += self.wide * self.v
        return kept + (self.normalized if self.model.final_norm else 0.0)

    # From B to W

    @cached_property
    def _operands(self) -> float:
        """Of a layer's weight gradients."""
        model, t, s, h, n, k, d, f = self.model, self.t, self.s, self.h, self.n, self.k, self.d, self.f
        matrices = 2 if model.mlp_gated else 1
        inputs = s * h * (1 if model.parallel_block == "one_norm" else 2) + t * n * d + t * f
        gradients = t * h * (1 if self.side_by_side else 2) + self.qkv + t * matrices * f
        vectors = (self.before + self.after) * self._norm
        biases = model.qkv_bias * (n + 2 * k) * d + model.attention_output_bias * h + model.mlp_bias * (matrices * f + h)
        if model.qk_norm != "none" and model.norm_weight:
            vectors += (2 * d if model.qk_norm == "head" else (n + k) * d) * (1 + model.qk_norm_bias)
        return self.size * (inputs + gradients) + self.wide * (vectors + biases)

    def _adapter_operands(self, layer: int) -> float:
        """Of the weight gradients of a layer's adapters."""
        t, s, h, f = self.t, self.s, self.h, self.f

        qkv, up, o, down = (self._reads(layer, *kinds) for kinds in (_QKV, _UP, ("attention.o",), ("mlp.down",)))
        normalized = (qkv or up) if self.model.parallel_block == "one_norm" else qkv + up
        inputs = normalized * s * h + o * t * self.n * self.d + down * t * f
        gradients = ((o or down) if self.side_by_side else o + down) * t * h + qkv * self.qkv
        gradients += up * t * f * (2 if self.model.mlp_gated else 1)
        return self.size * (inputs + gradients) + 2.0 * self._low_rank(layer)

    @cached_property
    def _norm(self) -> int:
        """Elements of the parameters of a norm of hidden states."""
        return self.h * (1 + self.model.norm_bias) if self.model.norm_weight else 0

    def _embedding_operands(self) -> float:
        model, stream = self.model, self.size * self.s * self.h
        waiting: float = IDS * self.t + self.size * self.t * self.h
        if model.position_embedding == "learned":
            waiting += IDS * self.s
            if self.several or model.embedding_multiplier != 1.0:  # else it is the gradient of the embedding itself
                waiting += stream
        return waiting + (self.wide * self._norm if model.embedding_norm else 0.0)

    def _head_operands(self) -> float:
        """The weight's own gradient was made in F."""
        vectors = (self._norm if self.model.final_norm else 0) + (self.v if self.model.head_bias else 0)
        return float(self.wide * vectors)
