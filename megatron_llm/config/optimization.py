"""The sections that say how weights are updated: optimizer, learning-rate schedule, precision. See `schema.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from megatron_llm.config.section import PositiveInt, Section

_POSITIVE_NUMBER = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])


class ParameterRuleConfig(Section):
    """What is different for some parameters. Where rules overlap the later one counts, setting by setting."""

    match: str = Field(min_length=1, description="pattern of logical names: `embedding.*`, `layers.[0-3].*`, `*norm.weight`")
    lr_scale: float | None = Field(default=None, gt=0, description="factor on the learning rate")
    weight_decay: float | None = Field(default=None, ge=0, description="in place of optimizer.weight_decay")
    frozen: bool | None = Field(default=None, description="the weights stay as they are and cost no gradients and no state")

    @model_validator(mode="after")
    def _says_something(self) -> ParameterRuleConfig:
        if self.lr_scale is None and self.weight_decay is None and self.frozen is None:
            raise ValueError(f"the rule for {self.match!r} changes nothing; give lr_scale, weight_decay or frozen")
        return self


class OptimizerConfig(Section):
    """How gradients become weights. Weight decay is decoupled from the gradient, and not applied to norms and biases."""

    name: Literal["adamw", "lion", "sgd"] = Field(
        default="adamw", description="lion: Chen et al. 2023, wants a rate 3 to 10 times lower; sgd: with momentum"
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        description="peak of lr_schedule. auto, for packed fine-tuning: 0.0003 * sqrt(tokens with loss in a global batch / 4e6), "
        "an upper bound, measured over the first rows of data.train"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="adamw, lion")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    state_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of moments. bfloat16 is rounded stochastically, or small changes would be lost for good"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="keep an average of the weights: average = decay * average + (1 - decay) * weights"
    )
    rules: list[ParameterRuleConfig] = Field(default=[], description="exceptions for parameters by name")

    @field_validator("lr", mode="before")
    @classmethod
    def _number_or_auto(cls, lr: Any) -> Any:
        """One error for what is neither, and not one for each of the two."""
        if lr == "auto":
            return lr
        try:
            return _POSITIVE_NUMBER.validate_python(lr)
        except ValidationError as error:
            raise ValueError(f"{error.errors()[0]['msg']}, or auto") from None

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class LrScheduleConfig(Section):
    """Linear warm-up to `optimizer.lr`, then a rule. Counted in steps that changed the weights, or all of it in tokens read."""

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        default="cosine", description="wsd: warm-up, stable, and a decay that ends with the run"
    )
    warmup_steps: int = Field(default=0, ge=0)
    warmup_tokens: int | None = Field(default=None, gt=0)
    decay_steps: int | None = Field(
        default=None,
        gt=0,
        description="linear, cosine: step at which the least rate is reached, the run's last if unset; "
        "wsd: length of the decay. Counted from a restart, if there was one",
    )
    decay_tokens: int | None = Field(default=None, gt=0, description="the same in tokens")
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = Field(default=None, description="wsd only; 1-sqrt if unset")
    min_lr: float = Field(default=0.0, ge=0, description="least rate after the warm-up")
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1, description="the same as a part of optimizer.lr")
    restart_steps: list[Annotated[int, PositiveInt]] | None = Field(
        default=None,
        description="continued pretraining: after these steps the schedule begins anew, with a warm-up from the rate it had; "
        "the one before ends there",
    )
    restart_tokens: list[Annotated[int, PositiveInt]] | None = Field(default=None, description="the same in tokens")

    @model_validator(mode="after")
    def _one_meaning(self) -> LrScheduleConfig:
        steps, tokens = (
            [f"{name}_{unit}" for name in ("warmup", "decay", "restart") if getattr(self, f"{name}_{unit}")]
            for unit in ("steps", "tokens")
        )
        if steps and tokens:
            raise ValueError(f"{steps[0]} counts steps and {tokens[0]} counts tokens; give all lengths in one of the two")
        if self.min_lr and self.min_lr_ratio is not None:
            raise ValueError(
                f"min_lr {self.min_lr} and min_lr_ratio {self.min_lr_ratio} both say where the rate ends; remove one of them"
            )
        if self.kind == "inverse_sqrt" and not self.warmup:
            raise ValueError("kind inverse_sqrt falls on the scale of its warm-up; give warmup_steps or warmup_tokens")
        if self.kind == "wsd" and not self.decay:
            raise ValueError("kind wsd needs the length of its decay; give decay_steps or decay_tokens")
        if any(later <= earlier for earlier, later in zip(self.restarts, self.restarts[1:], strict=False)):
            raise ValueError(f"restarts {self.restarts} must ascend")
        return self

    @property
    def unit(self) -> Literal["steps", "tokens"]:
        """What the schedule counts."""
        return "tokens" if self.warmup_tokens or self.decay_tokens or self.restart_tokens else "steps"

    @property
    def warmup(self) -> int:
        """Length of a warm-up in `unit`."""
        return self.warmup_tokens or self.warmup_steps

    @property
    def decay(self) -> int | None:
        """Length or end of the decay in `unit`, as it was given."""
        return self.decay_tokens or self.decay_steps

    @property
    def restarts(self) -> list[int]:
        """Positions in `unit`, ascending."""
        return self.restart_tokens or self.restart_steps or []


class PrecisionConfig(Section):
    """dtypes. Masters and statistics use at least float32, whatever is chosen here; moments: optimizer.state_dtype."""

    compute: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="weights and activations; auto: bfloat16 on GPU, float32 on CPU"
    )
    linear: Literal["compute", "fp8"] = Field(
        default="compute",
        description="in which the linear layers of the decoder multiply. fp8: y = x W^T and dx = dy W from 8-bit operands with "
        "scales by token and channel, on GPUs of compute capability 8.9 or more, if all sizes are multiples of 16; weights and "
        "their gradients, adapters, embedding and head stay in the compute dtype, bfloat16",
    )
    gradients: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="main gradients, in which micro-batches add up; auto: at least float32"
    )
    gradient_reduction: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="how data-parallel ranks send gradients; auto: as main gradients are. What arrives is added in float32",
    )
    loss_scale: Annotated[float, Field(gt=0)] | Literal["dynamic"] = Field(
        default="dynamic", description="compute float16 only: factor on the loss that keeps small gradients above zero"
    )
    loss_scale_window: int = Field(
        default=1000, gt=0, description="dynamic: finite steps in a row after which the factor doubles; one that is not halves it"
    )

    @model_validator(mode="after")
    def _dtypes_fit(self) -> PrecisionConfig:
        if self.compute == "float64" and (self.gradients, self.gradient_reduction) != ("auto", "auto"):
            raise ValueError("compute float64 is for proofs: gradients and gradient_reduction must stay auto")
        if self.linear == "fp8" and self.compute not in ("auto", "bfloat16"):
            raise ValueError(
                f"linear fp8 has results in bfloat16, and compute is {self.compute}; set compute to bfloat16 or auto"
            )
        if self.gradients == "bfloat16" and self.gradient_reduction == "float32":
            raise ValueError(
                "gradient_reduction float32 makes no difference to bfloat16 gradients but twice the bytes: they are added in "
                "float32 anyway; leave it out"
            )
        return self
