"""Small decoders that are no Llamas, for tests of everything that depends on the model: between them they use every option.

Named after the families that are most like them. Heads and inner sizes are divisible by few layouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.sources import FreshWeights

_LAYER_NORM: dict[str, Any] = {"norm": "layer_norm", "norm_bias": True}
_BIASES: dict[str, Any] = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
_PLAIN: dict[str, Any] = {"mlp_gated": False, "hidden_act": "gelu"}


def _sized(heads: int, keys: int, dim: int, **fields: Any) -> dict[str, Any]:
    """Sections are merged into a base that is a Llama, so what is derived is said."""
    sizes = {"vocab_size": 61, "intermediate_size": 31, "num_hidden_layers": 3, "initializer_range": 0.2}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": dim, "hidden_size": 20}
    return {**sizes, **heads_of, **fields}


DECODERS: dict[str, dict[str, Any]] = {
    "falcon": _sized(7, 1, 4, **_LAYER_NORM, **_PLAIN, parallel_block="one_norm", tie_word_embeddings=True),
    "neox": _sized(5, 5, 6, **_LAYER_NORM, **_PLAIN, **_BIASES, parallel_block="two_norms", rotary_dim=4),
    "olmo2": _sized(8, 2, 4, norm_placement="output", qk_norm="full"),
    "bloom": _sized(
        5, 5, 4, **_LAYER_NORM, **_BIASES, mlp_gated=False, hidden_act="gelu_tanh", position_embedding="alibi",
        embedding_norm=True, tie_word_embeddings=True,
    ),
    "opt": _sized(
        4, 4, 5, **_LAYER_NORM, **_BIASES, mlp_gated=False, hidden_act="relu", position_embedding="learned",
        position_offset=2, max_position_embeddings=12, tie_word_embeddings=True,
    ),
    "gemma2": _sized(
        8, 4, 4, norm_placement="both", norm_weight_offset=1.0, hidden_act="gelu_tanh", attention_scale=0.3,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=4, embedding_multiplier=20**0.5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True,
    ),
    "cohere2": _sized(
        8, 4, 4, norm="layer_norm", parallel_block="one_norm", qk_norm="per_head", qk_norm_bias=True, rope_interleaved=True,
        logit_multiplier=0.7, residual_multiplier=0.6, sliding_window=5, nope_layers=[1], rope_local_theta=500.0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "olmo": _sized(
        6, 3, 4, norm="layer_norm", norm_weight=False, clip_qkv=0.5, qk_norm="head", head_bias=True, mlp_bias=True,
        hidden_act="gelu",
    ),
    "qwen3": _sized(6, 3, 4, qk_norm="head", nope_layers=[2]),
    "gpt": _sized(
        4, 4, 5, **_LAYER_NORM, **_BIASES, **_PLAIN, norm_placement="residual", final_norm=False, position_embedding="none",
        clip_qkv=1.0, attention_scale_by_layer=True,
    ),
    "starcoder": _sized(
        6, 2, 4, **_LAYER_NORM, **_BIASES, position_embedding="alibi", alibi_scaled=True, alibi_bias_max=4.0, sliding_window=6,
        qk_norm="per_head", head_bias=True,
    ),
}  # fmt: skip


class AllRandom:
    """Like fresh weights, but norms are around 1 (or 0) and biases around 0: mix-ups would hide behind ones and zeros."""

    def __init__(self, seed: int, standard_deviation: float = 0.2):
        self.fresh = FreshWeights(seed, standard_deviation)

    def read(self, part: Part, box: Box) -> Tensor:
        values = self.fresh.read(replace(part, init="normal"), box)
        return values + float(part.init == "ones") if part.init != "normal" else values
