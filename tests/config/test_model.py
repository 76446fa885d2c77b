"""Combinations of options that are no decoder are refused, so that parameters and `models/names.py` cannot disagree."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_llm.config import ModelConfig
from tests.decoders import DECODERS


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": "per_head"},
        {"qk_norm": "full", "norm": "rms_norm"},
        {"norm_bias": True},
        {"qk_norm": "head", "qk_norm_bias": True},
    ],
)
def test_norms_without_parameters_have_none_anywhere(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="norm_weight false goes without"):
        ModelConfig(**{**DECODERS["olmo"], **fields})
