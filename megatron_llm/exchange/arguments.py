"""The arguments of a Megatron run (`args` in `common.pt`) to a ModelConfig, and back.

Whatever changes what the model computes and that this engine does not have is refused by name. Arguments that concern
training alone (dropout, precision, parallelism) are not looked at. Called by `imports.py` and `export.py`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pydantic import ValidationError

from megatron_llm.config import ModelConfig, sentences
from megatron_llm.ops.tensor_file import torch_dtype

_FIXED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What --use-rope-scaling means besides its factor: Llama 3's values, not to be set in Megatron."""

_ONLY: dict[str, tuple[Any, Any]] = {  # argument: (Megatron's default, the value that a Llama has)
    "swiglu": (False, True),
    "normalization": ("LayerNorm", "RMSNorm"),
    "add_bias_linear": (True, False),
    "add_qkv_bias": (False, False),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "apply_layernorm_1p": (False, False),
    "layernorm_zero_centered_gamma": (False, False),
    "qk_layernorm": (False, False),
    "qk_l2_norm": (False, False),
    "num_experts": (None, None),
    "num_moe_experts": (None, None),
    "multi_latent_attention": (False, False),
    "mtp_num_layers": (None, None),
    "apply_residual_connection_post_layernorm": (False, False),
    "window_size": (None, None),
    "softmax_scale": (None, None),
    "softmax_type": ("vanilla", "vanilla"),
    "attention_output_gate": (False, False),
    "no_rope_freq": (None, None),
    "squared_relu": (False, False),
    "quick_geglu": (False, False),
    "glu_linear_offset": (0.0, 0.0),
    "activation_func_clamp_value": (None, None),
    "is_hybrid_model": (False, False),
    "hybrid_override_pattern": (None, None),
    "hybrid_layer_pattern": (None, None),
    "linear_attention_freq": (None, None),
    "experimental_attention_variant": (None, None),
    "heterogeneous_layers_config_path": (None, None),
    "heterogeneous_layers_config_encoded_json": (None, None),
    "spec": (None, None),
}
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
}


_OF_EVERY_LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
    "hf", "checkpoint", "checkpoint_ema", "resize_vocab",
)  # fmt: skip


def refuse_other_than_llama(model: ModelConfig, what: str) -> None:
    """Raises ValueError naming what keeps a model from being exchanged with Megatron: it must be a Llama."""
    plain = ModelConfig(**model.model_dump(include=set(_OF_EVERY_LLAMA)))
    mine, theirs = model.model_dump(), plain.model_dump()
    different = [f"{name} {value!r}" for name, value in mine.items() if name != "rope_scaling" and value != theirs[name]]
    if model.rope_scaling is not None and model.rope_scaling.rope_type not in ("linear", "llama3"):
        different.append(f"rope type {model.rope_scaling.rope_type}")
    if different:
        raise ValueError(f"{what} has {', '.join(different)}; only models like Llama are exchanged with Megatron")


def model_from_args(args: Namespace, vocab_size: int, where: str) -> ModelConfig:
    """The model that a run's arguments describe. Raises ValueError with every reason why this engine cannot run it.

    Args:
        vocab_size: true size of the vocabulary; `padded_vocab_size` does not tell it.
        where: file that the arguments are from, for messages.
    """
    problems = [f"{name} is missing" for name in _SIZES.values() if getattr(args, name, None) is None]
    for name, (default, supported) in _ONLY.items():
        value = getattr(args, name, default)
        if value is None and supported is False:
            value = False
        if value != supported and not (supported is None and not value):
            problems.append(f"{name} {value!r} is not supported, only {supported!r}")
    fields: dict[str, Any] = {ours: getattr(args, theirs, None) for ours, theirs in _SIZES.items()}
    fields["vocab_size"] = vocab_size
    if getattr(args, "group_query_attention", False):
        fields["num_key_value_heads"] = getattr(args, "num_query_groups", None) or 0
    fields["head_dim"] = getattr(args, "kv_channels", None) or 0
    fields["rope_theta"] = getattr(args, "rotary_base", 10000)
    fields["rope_scaling"] = _scaling(args, problems)
    epsilons = {getattr(args, name) for name in ("norm_epsilon", "layernorm_epsilon") if hasattr(args, name)} or {1e-5}
    if len(epsilons) > 1:
        problems.append(f"norm_epsilon and layernorm_epsilon disagree: {sorted(epsilons)}")
    fields["norm_eps"] = min(epsilons)
    fields["max_position_embeddings"] = getattr(args, "max_position_embeddings", None) or 0
    fields["tie_word_embeddings"] = not getattr(args, "untie_embeddings_and_output_weights", False)
    fields["initializer_range"] = getattr(args, "init_method_std", 0.02)
    if problems:
        raise ValueError(f"{where}: the run's arguments do not describe a Llama: " + "; ".join(problems))
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(sentences(error))}") from error


def _scaling(args: Namespace, problems: list[str]) -> dict[str, Any] | None:
    """Fields of RopeScalingConfig; adds to `problems`."""
    kind = getattr(args, "position_embedding_type", None)
    if kind != "rope" and not (kind in (None, "learned_absolute") and getattr(args, "use_rotary_position_embeddings", False)):
        problems.append(f"position_embedding_type {kind!r} is not supported, only 'rope'")
    if getattr(args, "rope_type", None) not in (None, "rope"):
        problems.append(f"rope_type {args.rope_type!r} is not supported, only 'rope'")
    linear = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if getattr(args, "use_rope_scaling", False):
        if linear not in (None, 1):
            problems.append(f"use_rope_scaling and rotary_seq_len_interpolation_factor {linear} together are not supported")
        return {"rope_type": "llama3", "factor": getattr(args, "rope_scaling_factor", 8.0), **_FIXED_ROPE}
    return None if linear in (None, 1) else {"rope_type": "linear", "factor": linear}


def true_vocab_size(args: Namespace) -> int | None:
    """The size of the vocabulary without padding, None where the arguments do not tell it for certain.

    `vocab_size` is what the user said, which many tokenizers do not look at, and a NullTokenizer adds one token to: it is
    believed if `padded_vocab_size` is this number, padded.
    """
    size, padded = getattr(args, "vocab_size", None), getattr(args, "padded_vocab_size", None)
    if size is None or padded is None or getattr(args, "tokenizer_type", None) in ("NullTokenizer", "NullMultimodalTokenizer"):
        return None
    multiple = getattr(args, "make_vocab_size_divisible_by", 128) * getattr(args, "tensor_model_parallel_size", 1)
    return int(size) if padded in (size, -(-size // multiple) * multiple) else None


def args_of(model: ModelConfig, padded_vocab_size: int, multiple: int, dtype: str) -> Namespace:
    """The arguments that describe `model` to Megatron-LM's `--use-checkpoint-args`.

    Args:
        padded_vocab_size, multiple: rows of the embedding, a multiple of `multiple`.
        dtype: safetensors' name of the dtype that the weights have.

    Raises ValueError where Megatron cannot say what the model needs.
    """
    scaling = model.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        wrong = {name: value for name, value in _FIXED_ROPE.items() if getattr(scaling, name) != value}
        if wrong:
            found = ", ".join(f"{name} {getattr(scaling, name)}" for name in wrong)
            raise ValueError(
                f"the model's rope_scaling has {found}; Megatron knows only "
                f"{', '.join(f'{name} {value}' for name, value in wrong.items())} and would rotate otherwise"
            )
    context = model.max_position_embeddings or None
    linear = scaling.factor if scaling is not None and scaling.rope_type == "linear" else None
    return Namespace(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_key_value_heads != model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        seq_length=context,
        max_position_embeddings=context,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=int(model.rope_theta) if model.rope_theta == int(model.rope_theta) else model.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=linear,
        use_rope_scaling=scaling is not None and linear is None,
        rope_scaling_factor=scaling.factor if scaling is not None and linear is None else 8.0,
        add_bias_linear=False,
        add_qkv_bias=False,
        swiglu=True,
        squared_relu=False,
        normalization="RMSNorm",
        norm_epsilon=model.norm_eps,
        apply_layernorm_1p=False,
        qk_layernorm=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.initializer_range,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        num_experts=None,
        multi_latent_attention=False,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=multiple,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype=torch_dtype(dtype),
        bf16=dtype == "BF16",
        fp16=dtype == "F16",
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
