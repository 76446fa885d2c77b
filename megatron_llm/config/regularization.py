"""The section `training.regularization`: noise and penalties of fine-tuning (`docs/fine_tuning.md`). See `schema.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_llm.config.section import Section


class RegularizationConfig(Section):
    """Noise and penalties of training steps; evaluation and generation have none of it. 0: off."""

    hidden_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="rate of dropout on what attention and MLP add to the residual stream"
    )
    hidden_dropout_profile: Literal["constant", "rising"] = Field(
        default="constant",
        description="of hidden_dropout over the layers. rising: from 0 in the first, linearly, to the whole rate in the last, as "
        "LIMA and Megatron's --lima-dropout",
    )
    neftune_noise_alpha: float = Field(
        default=0.0,
        ge=0,
        description="NEFTune: uniform noise of up to alpha / sqrt(tokens of the document * hidden_size) on embedded tokens",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each label that goes to all tokens of the vocabulary alike"
    )
    z_loss: float = Field(default=0.0, ge=0, description="coefficient of log(sum of exp(logits))^2 of each token, as PaLM: 1e-4")

    @model_validator(mode="after")
    def _profile_of_something(self) -> RegularizationConfig:
        if self.hidden_dropout_profile == "rising" and not self.hidden_dropout:
            raise ValueError("hidden_dropout_profile rising says how hidden_dropout rises, and that is 0; give it, LIMA has 0.3")
        return self
