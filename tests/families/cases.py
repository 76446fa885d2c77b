"""Small random models of every family, made by transformers: the oracle of the tests beside this file.

A case is one setting of one architecture. Sizes are odd on purpose: heads * head_dim is not the hidden size where the family
allows it, three query heads share a key head, the vocabulary is divisible by nothing, and each flag is on in some case and off
in another.
"""

from __future__ import annotations

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
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    respell: Callable[[Path], None] | None = None
    layouts: bool = True


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
    model = architecture._from_config(architecture.config_class(**case.config), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    return model.eval()


def make_folder(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write the model's folder, in the case's spelling; returns the model, with the values that the folder has."""
    model = make_model(case).to(dtype)
    model.save_pretrained(folder)
    if case.respell is not None:
        case.respell(folder)
    return model.float()
