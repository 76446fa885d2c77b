"""Every tensor of a decoder by its logical name and shape, from the configuration alone: what checkpoints and folders hold.

Torch-free: `hf/` checks folders with it on a login node. `models/decoder.py` builds parameters of exactly these parts.

A name does not depend on the layout; matrices are [outputs, inputs]. In the order of the forward pass:

    embedding.weight  position_embedding.weight  embedding_norm
    layers.I.  attention_norm  attention.{q,k,v}  attention.{q,k}_norm  attention.o  attention_post_norm
               mlp_norm  mlp.gate  mlp.up  mlp.down  mlp_post_norm
    final_norm  head
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llm.config import ModelConfig

Named = tuple[str, tuple[int, ...]]


def logical_tensors(model: ModelConfig) -> Iterator[Named]:
    """(name, shape) of every tensor; the head's matrix only if it is not that of the embedding."""
    hidden, vocabulary = model.hidden_size, model.vocab_size
    yield "embedding.weight", (vocabulary, hidden)
    if model.position_embedding == "learned":
        yield "position_embedding.weight", (model.max_position_embeddings + model.position_offset, hidden)
    if model.embedding_norm:
        yield from _norm(model, "embedding_norm", (hidden,), model.norm_bias)
    for layer in range(model.num_hidden_layers):
        yield from layer_tensors(model, f"layers.{layer}.")
    if model.final_norm:
        yield from _norm(model, "final_norm", (hidden,), model.norm_bias)
    if not model.tie_word_embeddings:
        yield "head.weight", (vocabulary, hidden)
    if model.head_bias:
        yield "head.bias", (vocabulary,)


def layer_tensors(model: ModelConfig, prefix: str) -> Iterator[Named]:
    """(name, shape) of every tensor of a layer."""
    hidden, inner, dim = model.hidden_size, model.intermediate_size, model.head_dim
    heads = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}
    before, after = norm_names(model)
    if "attention" in before:
        yield from _norm(model, f"{prefix}attention_norm", (hidden,), model.norm_bias)
    for name, count in heads.items():
        yield from _linear(f"{prefix}attention.{name}", count * dim, hidden, model.qkv_bias)
    if model.qk_norm != "none":
        for name in ("q", "k"):
            shape = {"head": (dim,), "per_head": (heads[name], dim), "full": (heads[name] * dim,)}[model.qk_norm]
            yield from _norm(model, f"{prefix}attention.{name}_norm", shape, model.qk_norm_bias)
    yield from _linear(f"{prefix}attention.o", hidden, heads["q"] * dim, model.attention_output_bias)
    if "attention" in after:
        yield from _norm(model, f"{prefix}attention_post_norm", (hidden,), model.norm_bias)
    if "mlp" in before:
        yield from _norm(model, f"{prefix}mlp_norm", (hidden,), model.norm_bias)
    for name in ("gate", "up") if model.mlp_gated else ("up",):
        yield from _linear(f"{prefix}mlp.{name}", inner, hidden, model.mlp_bias)
    yield from _linear(f"{prefix}mlp.down", hidden, inner, model.mlp_bias)
    if "mlp" in after:
        yield from _norm(model, f"{prefix}mlp_post_norm", (hidden,), model.norm_bias)


def norm_names(model: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of attention and mlp have a norm of their own before them, and which behind them."""
    both = ("attention", "mlp")
    if model.parallel_block == "one_norm":
        return ("attention",), ()
    before = both if model.norm_placement in ("input", "both") else ()
    return before, both if model.norm_placement in ("output", "both", "residual") else ()


def _norm(model: ModelConfig, name: str, shape: tuple[int, ...], bias: bool) -> Iterator[Named]:
    if model.norm_weight:
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[Named]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)
