"""Small random models of every family, made by transformers: the oracle of the tests beside this file.

A case is one setting of one architecture. Sizes are odd on purpose: heads * head_dim is not the hidden size where the family
allows it, three query heads share a key head, the vocabulary is divisible by nothing, and each flag is on in some case and off
in another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        architecture: transformers' class.
        config: what its configuration is made of.
        respell: rewrites the folder that transformers wrote into a spelling found elsewhere: older names of fields, tensors
            without a prefix, buffers, .bin files. Gets the folder.
        layouts: whether to try it under tensor and pipeline parallelism (one case of each sort is enough).
        dtype: of the folder's tensors, unless a test asks for another.
        attention: transformers' implementation that is the oracle.
        adjust: makes a model of transformers compute what the architecture means where transformers overlooks a field.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    respell: Callable[[Path], None] | None = None
    layouts: bool = True
    dtype: torch.dtype = torch.float32
    attention: str = "eager"
    adjust: Callable[[Any], None] | None = None


LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
"""The plainest of all, for tests that need some folder."""


@cache
def cases() -> dict[str, Case]:
    """Every case by its name."""
    from tests.families import gpt_like, llama_like

    return {**llama_like.CASES, **gpt_like.CASES}


def make_model(case: Case) -> Any:
    """The model with random weights, in float32 and evaluation mode: norms too, as ones would hide a mix-up."""
    import transformers

    architecture = getattr(transformers, case.architecture)
    torch.manual_seed(0)
    config = architecture.config_class(**copy.deepcopy(case.config))  # it changes what it is given
    model = architecture._from_config(config, attn_implementation=case.attention, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # a row of OPT's without gradient, which is a choice of training and not of the model
    if case.adjust is not None:
        case.adjust(model)
    return model.eval()


def make_folder(case: Case, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Write the model's folder, in the case's spelling; returns the model, with the values that the folder has."""
    dtype = dtype or case.dtype
    model = make_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # a copy: rotary frequencies are never rounded
    if case.respell is not None:
        case.respell(folder)
    return model
