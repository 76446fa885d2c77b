"""Cases of the families with LayerNorm that came before Llama, and of Phi: see `cases.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.families.cases import Case
from tests.families.respell import masks, old, respelled

VOCABULARY, HIDDEN, LAYERS, POSITIONS = 131, 48, 3, 64


GPT2 = dict(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=6, n_positions=POSITIONS, eos_token_id=3, bos_token_id=3)
GPT2_NAMES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}  # fmt: skip
GPT2_MASKS = partial(masks, positions=POSITIONS, attention="h.{}.attn")

GPT2_CASES = {
    "gpt2": Case("GPT2LMHeadModel", GPT2),
    "gpt2-options": Case(
        "GPT2LMHeadModel",
        GPT2
        | dict(
            n_inner=80, activation_function="relu", tie_word_embeddings=False, scale_attn_weights=False, layer_norm_epsilon=1e-2,
            scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
        ),
    ),
    "gpt2-scaled-by-layer": Case("GPT2LMHeadModel", GPT2 | dict(scale_attn_by_inverse_layer_idx=True), layouts=False),
    "gpt2-published": Case(
        "GPT2LMHeadModel",
        GPT2,
        respelled(
            old(drop=("tie_word_embeddings", "scale_attn_weights", "n_inner", "add_cross_attention"), n_ctx=POSITIONS),
            prefix="transformer.", buffers=partial(GPT2_MASKS, masked=False),
        ),
        layouts=False,
    ),
    "gpt2-half-precision-bin": Case(
        "GPT2LMHeadModel",
        GPT2,
        respelled(
            old(names=GPT2_NAMES), buffers=GPT2_MASKS, head=("lm_head.weight", "transformer.wte.weight"), pickled=True
        ),
        layouts=False,
        dtype=torch.float16,
    ),
}  # fmt: skip

BIGCODE_CASES = {
    "gpt-bigcode-multi-query": Case("GPTBigCodeForCausalLM", GPT2),
    "gpt-bigcode-multi-head": Case(
        "GPTBigCodeForCausalLM",
        GPT2
        | dict(
            multi_query=False, n_inner=80, activation_function="gelu", tie_word_embeddings=False, scale_attn_weights=False,
            layer_norm_epsilon=1e-2, attention_softmax_in_fp32=False, scale_attention_softmax_in_fp32=False,
        ),
    ),
    "gpt-bigcode-old": Case(
        "GPTBigCodeForCausalLM", GPT2, respelled(old(n_ctx=POSITIONS), buffers=GPT2_MASKS, pickled=True), layouts=False
    ),
}  # fmt: skip

GPTJ = GPT2 | dict(rotary_dim=4)
GPTJ_CASES = {
    "gptj": Case("GPTJForCausalLM", GPTJ),
    "gptj-tied": Case(
        "GPTJForCausalLM",
        GPTJ | dict(n_inner=80, activation_function="relu", tie_word_embeddings=True, rotary_dim=8, layer_norm_epsilon=1e-2),
    ),
    "gptj-old": Case(
        "GPTJForCausalLM",
        GPTJ,
        respelled(old(rotary=True, scale_attn_weights=True, n_ctx=POSITIONS), buffers=GPT2_MASKS, pickled=True),
        layouts=False,
        dtype=torch.float16,
    ),
}

CODEGEN_CASES = {
    "codegen": Case("CodeGenForCausalLM", GPTJ),
    "codegen-heads-across-blocks": Case(  # a block of qkv_proj is one head and a quarter
        "CodeGenForCausalLM",
        GPTJ
        | dict(n_embd=40, n_head=5, n_inner=80, tie_word_embeddings=True, activation_function="gelu", layer_norm_epsilon=1e-2),
    ),
    "codegen-old": Case(
        "CodeGenForCausalLM",
        GPTJ,
        respelled(
            old(names=GPT2_NAMES, scale_attn_weights=True),
            buffers=lambda layer: {f"h.{layer}.attn.causal_mask": torch.ones(1, 1, POSITIONS, POSITIONS).tril().to(torch.uint8)},
        ),
        layouts=False,
    ),
}

NEO = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=6, max_position_embeddings=POSITIONS, window_size=4,
    attention_types=[[["global", "local", "global"], 1]], eos_token_id=3, bos_token_id=3,
)  # fmt: skip
NEO_CASES = {
    "gpt-neo": Case("GPTNeoForCausalLM", NEO | dict(num_layers=4, attention_types=[[["global", "local"], 2]])),
    "gpt-neo-local": Case(
        "GPTNeoForCausalLM",
        NEO
        | dict(
            attention_types=[[["local"], 3]], intermediate_size=80, activation_function="relu", tie_word_embeddings=False,
            layer_norm_epsilon=1e-2,
        ),
    ),
    "gpt-neo-global": Case("GPTNeoForCausalLM", NEO | dict(attention_types=[[["global"], 3]]), layouts=False),
    "gpt-neo-old": Case(
        "GPTNeoForCausalLM",
        NEO | dict(intermediate_size=80),
        respelled(
            old(
                drop=("attention_layers",), names={"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
            ),
            buffers=partial(masks, positions=POSITIONS, attention="h.{}.attn.attention"),
        ),
        layouts=False,
    ),
}  # fmt: skip

NEOX = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6, intermediate_size=80,
    max_position_embeddings=POSITIONS, rope_parameters=dict(rope_type="default", rope_theta=3000.0, partial_rotary_factor=0.5),
)  # fmt: skip
NEOX_CASES = {
    "gpt-neox": Case("GPTNeoXForCausalLM", NEOX),
    "gpt-neox-sequential": Case(
        "GPTNeoXForCausalLM",
        NEOX
        | dict(
            use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new",
            layer_norm_eps=1e-2,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0, partial_rotary_factor=1.0),
        ),
    ),
    "gpt-neox-pythia": Case(
        "GPTNeoXForCausalLM",
        NEOX,
        respelled(
            old(
                drop=("attention_bias",), names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
                gptj_residual=True,
            ),
            buffers=lambda layer: {
                **masks(layer, POSITIONS, "layers.{}.attention"), f"layers.{layer}.attention.rotary_emb.inv_freq": torch.ones(2)
            },
            pickled=True,
        ),
        layouts=False,
        dtype=torch.float16,
    ),
    "gpt-neox-old-scaled": Case(
        "GPTNeoXForCausalLM",
        NEOX | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0, partial_rotary_factor=0.25)),
        respelled(  # defaults left out, and the keys that transformers 4 wrote beside its own without reading them
            old(
                names={"rope_theta": "rotary_emb_base"}, drop=("use_parallel_residual",), rope_theta=77.0,
                partial_rotary_factor=1.0,
            )
        ),
        layouts=False,
    ),
}  # fmt: skip

MPT = dict(vocab_size=VOCABULARY, d_model=HIDDEN, n_layers=LAYERS, n_heads=6, max_seq_len=POSITIONS)


def _believe_alibi_bias_max(model: Any) -> None:
    """`MptModel.forward` leaves the default of its own function in place."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    most = model.config.attn_config.alibi_bias_max
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=most)


MPT_CASES = {
    "mpt": Case("MptForCausalLM", MPT),
    "mpt-options": Case(
        "MptForCausalLM",
        MPT
        | dict(
            n_heads=4, attn_config=dict(clip_qkv=1.5, softmax_scale=0.4), tie_word_embeddings=False, layer_norm_epsilon=1e-2,
        ),
    ),
    "mpt-storywriter": Case(
        "MptForCausalLM", MPT | dict(attn_config=dict(clip_qkv=2.0, alibi_bias_max=16)), adjust=_believe_alibi_bias_max
    ),
    "mpt-published": Case(
        "MptForCausalLM",
        MPT,
        respelled(
            old(
                drop=("tie_word_embeddings", "initializer_range", "layer_norm_epsilon", "attn_config"),
                architectures=["MPTForCausalLM"],
                attn_config=dict(
                    alibi=True, alibi_bias_max=8, attn_impl="torch", attn_pdrop=0, attn_type="multihead_attention",
                    attn_uses_sequence_id=False, clip_qkv=None, prefix_lm=False, qk_ln=False, softmax_scale=None,
                ),
                auto_map={"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
                emb_pdrop=0, embedding_fraction=1.0, init_config={"name": "kaiming_normal_", "verbose": 0}, init_device="cpu",
                tokenizer_name="EleutherAI/gpt-neox-20b", verbose=0,
            ),
            pickled=True,
        ),
        layouts=False,
        dtype=torch.float16,
    ),
}  # fmt: skip

BLOOM = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=6)
BLOOM_CASES = {
    "bloom": Case("BloomForCausalLM", BLOOM),
    "bloom-untied": Case(
        "BloomForCausalLM", BLOOM | dict(n_head=4, tie_word_embeddings=False, layer_norm_epsilon=1e-2, pretraining_tp=4)
    ),
    "bloom-published": Case(
        "BloomForCausalLM",
        BLOOM,
        respelled(
            old(
                names={"hidden_size": "n_embed", "n_head": "num_attention_heads"}, drop=("tie_word_embeddings",),
                architectures=["BloomModel"], seq_length=POSITIONS, offset_alibi=100, bias_dropout_fusion=True,
                attention_softmax_in_fp32=True,
            ),
            prefix="transformer.", pickled=True,
        ),
        layouts=False,
        dtype=torch.float16,
    ),
    "bloom-attribute-names": Case(
        "BloomForCausalLM",
        BLOOM,
        respelled(
            old(names={"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}),
            head=("lm_head.weight", "transformer.word_embeddings.weight"),
        ),
        layouts=False,
    ),
}  # fmt: skip

FALCON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6, max_position_embeddings=POSITIONS,
)  # fmt: skip
FALCON_7B = FALCON | dict(hidden_size=56, num_attention_heads=7)
FALCON_CASES = {
    "falcon-7b": Case("FalconForCausalLM", FALCON_7B),
    "falcon-40b": Case(
        "FalconForCausalLM", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, bias=True, layer_norm_epsilon=1e-2)
    ),
    "falcon-11b": Case(
        "FalconForCausalLM",
        FALCON
        | dict(
            new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=80,
            tie_word_embeddings=False, activation="gelu_new", rope_parameters=dict(rope_type="default", rope_theta=500042.0),
        ),
    ),
    "falcon-rw": Case(
        "FalconForCausalLM", FALCON | dict(alibi=True, bias=True, multi_query=False, parallel_attn=False), attention="sdpa"
    ),
    "falcon-alibi-40b": Case(
        "FalconForCausalLM",
        FALCON | dict(alibi=True, new_decoder_architecture=True, num_kv_heads=2),
        attention="sdpa",
        layouts=False,
    ),
    "falcon-one-key-head-sequential": Case(
        "FalconForCausalLM",
        FALCON | dict(parallel_attn=False, rope_parameters=dict(rope_type="linear", rope_theta=3000.0, factor=2.0)),
        layouts=False,
    ),
    "falcon-multi-head": Case("FalconForCausalLM", FALCON | dict(multi_query=False), layouts=False),
    "falcon-published": Case(
        "FalconForCausalLM",
        FALCON_7B | dict(num_kv_heads=7),
        respelled(
            old(
                drop=(
                    "num_ln_in_parallel_attn", "ffn_hidden_size", "activation", "max_position_embeddings", "tie_word_embeddings",
                ),
                auto_map={"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"},
                apply_residual_connection_post_layernorm=False,
            ),
            buffers=lambda layer: {f"h.{layer}.self_attention.maybe_rotary.inv_freq": torch.ones(4)},
            head=("lm_head.weight", "transformer.word_embeddings.weight"),
            pickled=True,
        ),
        layouts=False,
    ),
}  # fmt: skip

OPT = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6, ffn_dim=80,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
OPT_CASES = {
    "opt": Case("OPTForCausalLM", OPT),
    "opt-post-norm": Case("OPTForCausalLM", OPT | dict(do_layer_norm_before=False, enable_bias=False)),
    "opt-plain-norms": Case(
        "OPTForCausalLM",
        OPT
        | dict(
            layer_norm_elementwise_affine=False, activation_function="gelu", tie_word_embeddings=False,
        ),
    ),
    "opt-no-final-norm": Case(
        "OPTForCausalLM", OPT | dict(activation_function="gelu", enable_bias=False, _remove_final_layer_norm=True), layouts=False
    ),
    "opt-old": Case(
        "OPTForCausalLM",
        OPT,
        respelled(
            old(drop=("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"), prefix="</s>"),
            prefix="model.", head=("lm_head.weight", "model.decoder.embed_tokens.weight"), pickled=True,
        ),
        layouts=False,
        dtype=torch.float16,
    ),
}  # fmt: skip

PHI = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6, intermediate_size=80,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
PHI_CASES = {
    "phi": Case("PhiForCausalLM", PHI),
    "phi-options": Case(
        "PhiForCausalLM",
        PHI
        | dict(
            num_key_value_heads=2, qk_layernorm=True, tie_word_embeddings=True, hidden_act="gelu", layer_norm_eps=1e-2,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=3000.0, partial_rotary_factor=0.75),
        ),
    ),
    "phi-head-dim": Case("PhiForCausalLM", PHI | dict(head_dim=12, num_attention_heads=5, num_key_value_heads=5), layouts=False),
    "phi-2": Case(
        "PhiForCausalLM",
        PHI | dict(hidden_size=40, num_attention_heads=4, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.4)),
        respelled(old(), buffers=lambda layer: {f"layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
        layouts=False,
        dtype=torch.float16,
    ),
}  # fmt: skip

CASES: dict[str, Case] = {
    **GPT2_CASES, **BIGCODE_CASES, **GPTJ_CASES, **CODEGEN_CASES, **NEO_CASES, **NEOX_CASES, **MPT_CASES, **BLOOM_CASES,
    **FALCON_CASES, **OPT_CASES, **PHI_CASES,
}  # fmt: skip
