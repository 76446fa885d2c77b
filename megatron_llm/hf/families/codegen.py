"""CodeGen: Salesforce's CodeGen 350M to 16B (nl, multi, mono).

GPT-J with queries, keys and values in one matrix, in four blocks for the four devices that it was trained on. A block holds a
quarter of the queries, of the values, of the keys: in this order (`CodeGenAttention.forward`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.families import gptj
from megatron_llm.hf.families.gpt2 import SIZES
from megatron_llm.hf.family import Family, Row

_BLOCKS = 4


def blocks_of_qvk(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Four times: a quarter of the queries, of the values, of the keys. A quarter need not be whole heads."""
    quarter = model.hidden_size // _BLOCKS
    for block in range(_BLOCKS):
        yield from ((part, block * quarter, quarter) for part in ("q", "v", "k"))


TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.h.{i}.ln_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.attn.qkv_proj.{kind}", "layers.{i}.attention.{part}.{kind}", blocks_of_qvk),
    *gptj.BODY,
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    fields = gptj.from_hf(read)
    if (fields["hidden_size"] or 0) % _BLOCKS:
        read.problems.append(f"n_embd {fields['hidden_size']} is not divisible by {_BLOCKS}, the blocks of qkv_proj")
    return fields


FAMILY = Family(
    architectures=("CodeGenForCausalLM",),
    model_type="codegen",
    from_hf=from_hf,
    to_hf=gptj.to_hf,
    table=TABLE,
    defaults=gptj.DEFAULTS,
    aliases=SIZES,
    prefix="transformer.",
    derived=gptj.DERIVED,
)
