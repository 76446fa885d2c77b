"""Which update rule holds for which parameter, and the kinds of state that it keeps. Called by `optim/zero1.py`.

`optimizer.rules` name logical tensors, of which a parameter may hold several (q, k and v): rates and decay may differ within a
parameter, but only as a whole can it be frozen. With adapters (section `peft`) whatever is none is frozen unless a rule thaws it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from megatron_llm.config import OptimizerConfig
from megatron_llm.config.peft import is_adapter
from megatron_llm.optim.layout import shard_of

MOMENTS = {"adamw": ("m", "v"), "lion": ("m",), "sgd": ("m",)}


@dataclass(frozen=True, order=True)
class Rule:
    """Attributes: factor on the learning rate; weight decay."""

    lr_scale: float
    weight_decay: float


def rule_for(name: str, decays: bool, config: OptimizerConfig) -> Rule:
    """The rule of a logical tensor. decays: whether its kind does, which matters unless a rule gives a number."""
    scale, decay = 1.0, config.weight_decay if decays else 0.0
    for rule in config.rules:
        if fnmatchcase(name, rule.match):
            scale = scale if rule.lr_scale is None else rule.lr_scale
            decay = decay if rule.weight_decay is None else rule.weight_decay
    return Rule(scale, decay)


def is_frozen(name: str, config: OptimizerConfig, adapters: bool = False) -> bool:
    """Whether the last rule that says so freezes a logical tensor. adapters: whether there are some: then others are frozen."""
    said = [rule.frozen for rule in config.rules if rule.frozen is not None and fnmatchcase(name, rule.match)]
    return said[-1] if said else adapters and not is_adapter(name)


def rules_of(parameter: nn.Parameter, config: OptimizerConfig) -> tuple[Rule, ...]:
    """A rule for each part of the parameter."""
    spec = shard_of(parameter)
    return tuple(rule_for(part.name, spec.decay, config) for part in spec.parts)


def freeze(parameters: Iterable[nn.Parameter], config: OptimizerConfig, adapters: bool = False) -> None:
    """Make the parameters that are frozen take no gradient. adapters: as of `is_frozen`."""
    for parameter in parameters:
        parameter.requires_grad_(not is_frozen(shard_of(parameter).parts[0].name, config, adapters))


def rule_problems(parameters: list[nn.Parameter], config: OptimizerConfig, adapters: bool = False) -> list[str]:
    """What is wrong with the rules, a sentence each, given the parameters of the whole model."""
    parts = [[part.name for part in shard_of(parameter).parts] for parameter in parameters]
    names = [name for group in parts for name in group]
    problems = [
        f"optimizer.rules.{number}.match: {rule.match!r} is the name of no weight; there are {', '.join(_examples(names))}"
        for number, rule in enumerate(config.rules)
        if not any(fnmatchcase(name, rule.match) for name in names)
    ]
    for group in parts:
        frozen = [name for name in group if is_frozen(name, config, adapters)]
        others = [name for name in group if name not in frozen]
        if frozen and others:
            problems.append(
                f"optimizer.rules: {', '.join(frozen)} would be frozen and {', '.join(others)} not, but they are one matrix; "
                "freeze all of them or none"
            )
    if all(is_frozen(name, config, adapters) for name in names):
        problems.append("optimizer.rules: every weight is frozen; there is nothing to train")
    return problems


def _examples(names: list[str]) -> list[str]:
    """The names outside layers and those of the first layer."""
    return [name for name in names if not name.startswith("layers.") or name.startswith("layers.0.")]
