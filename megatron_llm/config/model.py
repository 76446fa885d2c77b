"""The shape of a decoder as data: every family of `hf/families/` is one setting of these fields.

Names follow Hugging Face where most families agree on one. The defaults are Llama's. `models/` builds what this describes,
`models/names.py` lists its tensors.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_llm.config.section import PositiveInt, Section


class RopeScalingConfig(Section):
    """How rotary frequencies are stretched for contexts beyond the pretrained one (HF's `rope_scaling`).

    `dynamic` and `longrope` choose the frequencies of every document by its length.
    """

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = Field(default=1.0, ge=1.0, description="longrope: for attention_factor alone")
    original_max_position_embeddings: int = Field(default=8192, gt=0, description="the pretrained context; all but linear")
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3 only")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3 only")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn only")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn only")
    truncate: bool = Field(default=True, description="yarn only: the ramp begins and ends at whole channels")
    attention_factor: float | None = Field(
        default=None,
        gt=0,
        description="yarn and longrope: what cosine and sine are multiplied by; unset: what their papers say for factor",
    )
    short_factor: list[float] = Field(default=[], description="longrope only: divides each frequency of short documents")
    long_factor: list[float] = Field(
        default=[], description="longrope only: the same of documents beyond original_max_position_embeddings"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RopeScalingConfig:
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}")
        if self.rope_type in ("yarn", "longrope") and self.attention_factor is None:
            growth, context = math.log(self.factor), math.log(self.original_max_position_embeddings)
            value = 0.1 * growth + 1.0 if self.rope_type == "yarn" else math.sqrt(1 + growth / context)
            object.__setattr__(self, "attention_factor", value)
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("longrope needs short_factor and long_factor, a number for each rotated pair of channels")
        return self

    @property
    def by_length(self) -> bool:
        """Whether the frequencies of a document depend on its length."""
        return self.rope_type in ("dynamic", "longrope")


def with_present_names(fields: dict[str, Any]) -> dict[str, Any]:
    """`norm_eps` was `rms_norm_eps` before there were other norms; checkpoints and configs of then still say so."""
    if "rms_norm_eps" not in fields or "norm_eps" in fields:
        return fields
    return {"norm_eps" if name == "rms_norm_eps" else name: value for name, value in fields.items()}


class ModelConfig(Section):
    """A decoder, a Llama unless fields say otherwise. With `hf` or `checkpoint` the remaining fields come from there."""

    hf: str | None = Field(default=None, description="Hugging Face folder to take architecture and weights from")
    checkpoint: str | None = Field(
        default=None,
        description="checkpoint, or run whose newest one is meant, to take architecture, weights and tokenizer from; the "
        "optimizer and all else begin anew",
    )
    checkpoint_ema: bool = Field(default=False, description="of checkpoint: the average that optimizer.ema_decay kept")
    resize_vocab: int = Field(
        default=0,
        ge=0,
        description="with hf or checkpoint: tokens that the vocabulary is to have, when the tokenizer has more than the model; "
        "new rows begin as the mean of the others. 0: as it is",
    )
    vocab_size: int = PositiveInt
    hidden_size: int = PositiveInt
    intermediate_size: int = PositiveInt
    num_hidden_layers: int = PositiveInt
    num_attention_heads: int = PositiveInt
    num_key_value_heads: int = Field(default=0, ge=0, description="0: as many as attention heads")
    head_dim: int = Field(default=0, ge=0, description="0: hidden_size / num_attention_heads")
    max_position_embeddings: int = Field(default=0, ge=0, description="0: training.sequence_length")
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, ge=0, description="standard deviation of freshly made weights")

    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_bias: bool = Field(default=False, description="layer_norm only")
    norm_weight: bool = Field(default=True, description="false: norms have no parameters (OLMo)")
    norm_weight_offset: float = Field(default=0.0, description="added to the weight of every norm; 1 for Gemma")
    norm_placement: Literal["input", "output", "both", "residual"] = Field(
        default="input",
        description="what attention and MLP have normalized: their input (pre-norm), their output (OLMo-2), both (Gemma-2), or "
        "the sum of input and output (post-norm)",
    )
    parallel_block: Literal["none", "one_norm", "two_norms"] = Field(
        default="none", description="attention and MLP side by side, both of the layer's input, with one norm or one each"
    )
    embedding_norm: bool = Field(default=False, description="a norm behind the embedding (BLOOM)")
    final_norm: bool = True

    position_embedding: Literal["rope", "alibi", "learned", "none"] = "rope"
    position_offset: int = Field(default=0, ge=0, description="learned: rows of the table before that of position 0 (OPT: 2)")
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScalingConfig | None = None
    rope_local_theta: float | None = Field(
        default=None, gt=0, description="rope_theta of layers with a sliding window, without scaling; unset: the same (Gemma-3)"
    )
    rotary_dim: int = Field(default=0, ge=0, description="rotated channels of a head, the first ones; 0: all")
    rope_interleaved: bool = Field(default=False, description="rotate channels 2i and 2i + 1 together, not i and i + half")
    nope_layers: list[int] = Field(default=[], description="layers without rotary embeddings (SmolLM3)")
    alibi_bias_max: float = Field(default=8.0, gt=0)
    alibi_scaled: bool = Field(
        default=False, description="ALiBi in bfloat16, multiplied by the attention scale like the scores (Falcon)"
    )

    qkv_bias: bool = False
    attention_output_bias: bool = False
    attention_scale: float | None = Field(default=None, gt=0, description="of the scores; unset: 1 / sqrt(head_dim)")
    attention_scale_by_layer: bool = Field(default=False, description="divide the scores of layer i by i + 1 (GPT-2)")
    attn_logit_softcapping: float | None = Field(default=None, gt=0, description="scores become cap * tanh(scores / cap)")
    clip_qkv: float | None = Field(default=None, gt=0, description="queries, keys and values are clipped to +- this")
    qk_norm: Literal["none", "head", "per_head", "full"] = Field(
        default="none",
        description="norm of queries and keys: over a head with one weight for all, over a head with a weight of its own, or "
        "over all heads together",
    )
    qk_norm_bias: bool = False
    sliding_window: int | None = Field(default=None, gt=0, description="tokens that a query sees, itself included")
    layer_types: list[Literal["full_attention", "sliding_attention"]] = Field(
        default=[], description="which layers have the window; empty: all if sliding_window is set"
    )

    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    mlp_gated: bool = Field(default=True, description="down(act(gate(x)) * up(x)), or without gate down(act(up(x)))")
    mlp_bias: bool = False

    embedding_multiplier: float = Field(default=1.0, gt=0)
    residual_multiplier: float = Field(default=1.0, gt=0, description="of what attention and MLP add to the residual")
    logit_multiplier: float = Field(default=1.0, gt=0)
    final_logit_softcapping: float | None = Field(default=None, gt=0, description="logits become cap * tanh(logits / cap)")
    head_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, fields: object) -> object:
        return with_present_names(fields) if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def _fill_derived(self) -> ModelConfig:
        heads = self.num_attention_heads
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if not self.head_dim:
            if self.hidden_size % heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}; set head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.position_embedding == "rope" and not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.resize_vocab:
            object.__setattr__(self, "vocab_size", self.resize_vocab)
        return self

    @model_validator(mode="after")
    def _rotations_fit(self) -> ModelConfig:
        if self.position_embedding != "rope":
            return self
        if self.rotary_dim % 2:
            name = "head_dim" if self.rotary_dim == self.head_dim else "rotary_dim"
            raise ValueError(f"{name} {self.rotary_dim} is odd; rotary embeddings rotate pairs of channels")
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} exceeds head_dim {self.head_dim}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"rope_scaling.{name} has {len(getattr(scaling, name))} numbers; there are {self.rotary_dim // 2} pairs"
                    )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        problems = []
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            problems.append(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            problems.append("layer_types has sliding_attention, but sliding_window is not set")
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.nope_layers):
            problems.append(f"nope_layers {self.nope_layers} are not all among {self.num_hidden_layers} layers")
        if not self.norm_weight and (self.norm_bias or self.qk_norm_bias or self.qk_norm in ("per_head", "full")):
            problems.append("norm_weight false goes without norm_bias and qk_norm_bias, and with qk_norm none or head")
        if self.norm == "rms_norm" and (self.norm_bias or self.qk_norm_bias):
            problems.append("norm_bias and qk_norm_bias belong to norm: layer_norm")
        if self.norm == "layer_norm" and self.qk_norm == "full":
            problems.append("qk_norm full goes with norm rms_norm")
        if self.head_bias and self.logit_multiplier != 1.0:
            problems.append("logit_multiplier goes with a head without bias")
        if self.parallel_block != "none" and self.norm_placement != "input":
            problems.append(f"parallel_block {self.parallel_block} goes with norm_placement input, not {self.norm_placement}")
        if self.position_embedding == "learned" and not self.max_position_embeddings:
            problems.append("position_embedding learned needs max_position_embeddings, the rows of its table")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def window(self, layer: int) -> int | None:
        """Tokens that a query of a layer sees, itself included; None: all before it."""
        sliding = self.layer_types[layer] == "sliding_attention" if self.layer_types else True
        return self.sliding_window if sliding else None

    def scale(self, layer: int) -> float:
        """What the scores of a layer are multiplied by."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.attention_scale_by_layer else scale
