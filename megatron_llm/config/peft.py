"""The section `peft`: training a few added parameters instead of the weights. See `schema.py`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from megatron_llm.config.section import Section

LORA_A, LORA_B = ".lora_a.weight", ".lora_b.weight"
"""How the logical names of an adapter's two matrices go on behind that of its linear layer: `layers.3.mlp.up.lora_a.weight`."""


def is_adapter(name: str) -> bool:
    """Whether a logical tensor belongs to an adapter."""
    return name.endswith((LORA_A, LORA_B))


class PeftConfig(Section):
    """LoRA (Hu et al. 2021): W + scale * B A in place of W, with A [rank, inputs] and B [outputs, rank] trained and W frozen.

    `optimizer.rules` may thaw weights of the model beside the adapters, such as norms.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, gt=0, description="of every adapter")
    alpha: float = Field(default=32.0, gt=0, description="scale * rank, or scale * sqrt(rank) with rslora")
    targets: list[str] = Field(
        default=["all-linear"],
        min_length=1,
        description="linear layers with an adapter: all-linear, patterns of logical names (`attention.q`, `mlp.*`, "
        "`layers.[0-3].attention.*`), or Llama's names for them (q_proj, ...)",
    )
    rslora: bool = Field(default=False, description="scale alpha / sqrt(rank), so that large ranks learn: arXiv 2312.03732")
    init: str | None = Field(
        default=None, description="folder of an adapter in PEFT's format to start from; what it says is the default of the others"
    )

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @field_validator("targets")
    @classmethod
    def _no_duplicates(cls, targets: list[str]) -> list[str]:
        return list(dict.fromkeys(targets))
