"""Phi-3, 3.5 and 4: Llama with fused projections, longrope and, in Phi-4-mini, partial rotation.

The pretrained context stands beside `rope_scaling`, and wins over one inside of it even as the default of 4096.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, partial_rotary_factor, rope_keys
from megatron_llm.hf.families.llama import ATTENTION, DEFAULTS, DERIVED, EMBEDDING, HEAD, MLP, MLP_NORM, base, base_keys, head_dim
from megatron_llm.hf.family import Family, Row, concatenated_qkv, gate_then_up

GATE_UP = (Row("model.layers.{i}.mlp.gate_up_proj.{kind}", "layers.{i}.mlp.{part}.{kind}", gate_then_up), MLP[-1])

_QKV = Row("model.layers.{i}.self_attn.qkv_proj.{kind}", "layers.{i}.attention.{part}.{kind}", concatenated_qkv)
_ORIGINAL = "original_max_position_embeddings"


def _from_hf(read: ConfigReader) -> dict[str, Any]:
    """transformers takes `yarn` for longrope, which the authors' code of the time did not compute: it is refused."""
    fields = base(read)
    rope = read.rope(head_dim(fields), types=("longrope",))
    return {**fields, "sliding_window": read.optional("sliding_window"), **rope}


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    """transformers 4 wants `rope_scaling` with three keys just so: an attention_factor only if no formula gives it."""
    keys = rope_keys(model)
    scaling = keys["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "longrope":
        short = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
        keys |= {"rope_scaling": short, _ORIGINAL: scaling[_ORIGINAL]}
        described = ConfigReader({**keys, "max_position_embeddings": model.max_position_embeddings}).rope(1)["rope_scaling"]
        if described["attention_factor"] != scaling["attention_factor"]:
            short["attention_factor"] = scaling["attention_factor"]
    return {
        **base_keys(model),
        "sliding_window": model.window(0),
        "partial_rotary_factor": partial_rotary_factor(model),
        **keys,
    }


FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    from_hf=_from_hf,
    to_hf=_to_hf,
    table=(*EMBEDDING, ATTENTION[0], _QKV, ATTENTION[-1], *MLP_NORM, *GATE_UP, *HEAD),
    defaults=DEFAULTS | {"max_position_embeddings": 4096, _ORIGINAL: 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    prefix="model.",
    derived=DERIVED,
)
