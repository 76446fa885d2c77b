"""Reading one config.json for a family: defaults, other spellings, and a list of everything that cannot be supported.

Two spellings of rotary settings are alive. Until transformers 4: `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and
`partial_rotary_factor` at the top. Since 5: all inside `rope_parameters`. Both are read, with transformers' precedence; changes
are written in the spelling that is there. Called by `family.py` and the files of `families/`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
"""transformers' names of activations -> ModelConfig.hidden_act: the spellings of tanh-GELU differ in rounding alone."""

_SCALING = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


class ConfigReader:
    """A config.json with what transformers assumes where it is silent.

    rope_names: what the family calls rotary settings at the top of config.json, where not as Llama does.

    Attributes:
        problems: why this engine cannot run it, a phrase each; whoever reads adds to them.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] = {},
        aliases: Mapping[str, str] = {},
        rope_names: Mapping[str, str] = {},
    ):
        self.config, self.defaults, self.aliases, self.rope_names = config, defaults, aliases, rope_names
        self.patched: dict[str, Any] = copy.deepcopy(dict(config))
        self.problems: list[str] = []

    def __call__(self, key: str) -> Any:
        """The value of a key, or its default; null counts as absent. A key with neither is a problem."""
        value = self.config.get(self._spelling(key))
        if value is None:
            value = self.defaults.get(key)
        if value is None and key not in self.defaults:
            self.problems.append(f"{key} is missing")
        return value

    def optional(self, key: str) -> Any:
        """The value of a key whose null says something of its own; its default only where the key is absent."""
        return self.config.get(self._spelling(key), self.defaults.get(key))

    def _spelling(self, key: str) -> str:
        """The name under which this config.json has a key."""
        if key in self.config:
            return key
        return next((other for other, name in self.aliases.items() if name == key and other in self.config), key)

    def notes(self) -> list[str]:
        """What holds for training with this config.json and may surprise, a sentence each."""
        others = ("classifier_dropout", "summary_first_dropout")  # of other heads than a language model's
        rates = {
            key: value
            for key, value in self.config.items()
            if "drop" in key and key not in others and isinstance(value, float) and value > 0
        }
        if not rates:
            return []
        listed = ", ".join(f"{key} {value:g}" for key, value in rates.items())
        setting = "training.regularization.hidden_dropout"
        return [f"dropout in config.json travels along without effect: {listed}; what training applies, {setting} says"]

    def only(self, key: str, *supported: Any) -> None:
        """A problem unless the key is absent, null, or one of these values."""
        value = self.config.get(self._spelling(key))
        if value is None or any(value == one and type(value) is type(one) for one in supported):
            return
        only = f", only {' or '.join(repr(one) for one in supported)}" if supported else ""
        self.problems.append(f"{key} {value!r} is not supported{only}")

    def activation(self, key: str) -> str:
        """ModelConfig.hidden_act of an activation by transformers' name."""
        name = self(key)
        if name not in ACTIVATIONS:
            self.problems.append(f"{key} {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS.get(name, "silu")

    def refuse_general(self, architectures: tuple[str, ...]) -> None:
        """What no family supports: quantized weights, code of the folder's own, what transformers offers to every model."""
        self.only("is_causal", True)
        if self.config.get("per_layer_config"):
            self.problems.append("per_layer_config: layers with settings of their own are not supported")
        if self.config.get("quantization_config"):
            self.problems.append("quantization_config: quantized weights cannot be trained; take the unquantized model")
        auto_map = self.config.get("auto_map")
        code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
        if code is not None and str(code).rpartition(".")[2].lower() not in {name.lower() for name in architectures}:
            self.problems.append(f"auto_map: the model is code of the folder ({code}), which is never run")

    def _rope_name(self, key: str) -> str:
        """What the family calls a rotary setting at the top of config.json."""
        return self.rope_names.get(key, key)

    def put(self, key: str, value: Any) -> None:
        """Set a key of `patched`, in the spelling of this config.json; what else an object holds stays."""
        name = self._spelling(key)
        old = self.patched.get(name)
        self.patched[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value

    def put_rope(self, keys: Mapping[str, Any], changed: set[str]) -> None:
        """Set the `changed` ones of all rotary settings, which have Llama's names in transformers 4, where `patched` has them."""
        scaling, original = keys.get("rope_scaling"), "original_max_position_embeddings"
        if original in self.config and "rope_scaling" in changed and scaling and original in scaling:
            self.patched[original] = scaling[original]  # beside rope_scaling it wins
        old, new_spelling = self.config.get("rope_scaling") or {}, self.config.get("rope_parameters")
        if not new_spelling or not isinstance(new_spelling, dict):
            for key in changed:
                self.patched |= dict.fromkeys({self._rope_name(key), *({key} & self.config.keys())}, keys[key])
            names = [name for name in ("type", "rope_type") if name in old]
            if scaling and "rope_scaling" in changed and names:
                self.patched["rope_scaling"] = {**dict.fromkeys(names, _type(scaling)), **_without_type(scaling)}
            return
        nested = {name: dict(value) for name, value in new_spelling.items() if isinstance(value, dict)}
        self.patched.pop("rope_scaling", None)  # beside rope_parameters it would win
        rope = nested.get("full_attention", {}) if nested else dict(new_spelling)
        if "rope_scaling" in changed:
            rope = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
            rope |= {"rope_type": _type(scaling), **_without_type(scaling)} if scaling else {"rope_type": "default"}
        rope |= {key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in changed}
        if nested:
            nested["full_attention"] = rope
            if "rope_local_base_freq" in changed:
                local = nested.get("sliding_attention", {"rope_type": "default"})
                nested["sliding_attention"] = local | {"rope_theta": keys["rope_local_base_freq"]}
        self.patched["rope_parameters"] = nested or rope

    def rope(
        self, head_dim: int | None = None, parameters: Mapping[str, Any] | None = None, types: tuple[str, ...] = tuple(_SCALING)
    ) -> dict[str, Any]:
        """rope_theta, rope_scaling and, if `head_dim` is given, rotary_dim.

        Args:
            parameters: what stands for `rope_parameters`, where layers of several sorts have their own.
            types: those that transformers allows for the architecture, beside default.
        """
        rope = parameters or self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            self.problems.append(f"rope_scaling must be a mapping, got {rope!r}")
            rope = {}
        if any(isinstance(value, dict) for value in rope.values()):
            self.problems.append(f"rope_parameters of their own for {', '.join(rope)} are not supported")
            rope = {}
        name = self._rope_name("rope_theta")
        theta = rope.get("rope_theta") or self.config.get(name) or self.defaults.get(name) or 10000.0
        fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": self._scaling(rope, parameters is not None, types)}
        key = "partial_rotary_factor"
        name = self._rope_name(key)
        partial = next((x for x in (rope.get(key), self.config.get(name), self.defaults.get(name)) if x is not None), 1.0)
        if head_dim is not None:
            fields["rotary_dim"] = int(head_dim * partial)
            if head_dim and not fields["rotary_dim"]:  # 0 would mean all of them
                self.problems.append(f"{name} {partial} of head_dim {head_dim} rotates nothing")
        elif partial != 1.0:
            self.problems.append(f"{key} {partial} is not supported, only 1.0")
        return fields

    def _scaling(self, rope: Mapping[str, Any], own: bool, types: tuple[str, ...]) -> dict[str, Any] | None:
        """Fields of RopeScalingConfig, None for plain rotation. `own`: of one sort of layers, whose dictionary says all."""
        kind = _type(rope)
        if kind == "default":
            return None
        if kind == "su":  # longrope's first name
            kind = "longrope"
        if kind not in types:
            self.problems.append(f"rope type {kind!r} is not supported, only default, {', '.join(types)}")
            return None
        values = {key: rope[key] for key in _SCALING[kind] if rope.get(key) is not None}
        context = self("max_position_embeddings")
        if kind == "dynamic":
            values["original_max_position_embeddings"] = context
        elif kind != "linear":  # transformers lets the value beside rope_scaling win, and falls back to the whole context
            key = "original_max_position_embeddings"
            original = None if own else self.config.get(key) or self.defaults.get(key)
            values["original_max_position_embeddings"] = original or rope.get("original_max_position_embeddings") or context
            self._attention_factor(kind, rope, values, context)
            if own:  # transformers looks for it beside the sorts of layers
                values.pop("truncate", None)
        optional = {"beta_fast", "beta_slow", "truncate", "attention_factor"}
        self.problems += [
            f"rope scaling {kind} lacks {key}" for key in _SCALING[kind] if key not in values and key not in optional
        ]
        return {"rope_type": kind, **values}

    @staticmethod
    def _attention_factor(kind: str, rope: Mapping[str, Any], values: dict[str, Any], context: int) -> None:
        """What yarn and longrope multiply cosine and sine by, where config.json leaves it to formulas of other fields."""
        original = values["original_max_position_embeddings"]
        factor = rope.get("factor") or context / original
        if kind == "yarn":
            values.setdefault("factor", factor)
            numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
            if not (numerator and denominator):
                numerator, denominator = 1.0, 0.0
            growth = math.log(max(factor, 1.0))
            values.setdefault("attention_factor", (0.1 * numerator * growth + 1.0) / (0.1 * denominator * growth + 1.0))
        elif kind == "longrope":
            default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            values.setdefault("attention_factor", default)


def activation_name(model: Any) -> str:
    """transformers' name of ModelConfig.hidden_act."""
    return "gelu_pytorch_tanh" if model.hidden_act == "gelu_tanh" else str(model.hidden_act)


def rope_keys(model: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling as config.json says them, without the fields that the type does not use.

    `dynamic` stretches what is longer than max_position_embeddings, so that key is then the pretrained context.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    kind = scaling.rope_type
    values = scaling.model_dump(include=set(_SCALING[kind]))
    context = {"max_position_embeddings": values.pop("original_max_position_embeddings")} if kind == "dynamic" else {}
    return {"rope_theta": model.rope_theta, "rope_scaling": {"rope_type": kind, **values}, **context}


def partial_rotary_factor(model: Any) -> float:
    """The share of a head's channels that is rotated, such that transformers' product with head_dim is just that many."""
    factor = float(model.rotary_dim / model.head_dim)
    return factor if int(model.head_dim * factor) == model.rotary_dim else math.nextafter(factor, 2.0)


def preimage(value: float, function: Callable[[float], float], near: float) -> float:
    """The number close to `near` whose `function` is `value`, a round one if possible: config.json says 144 for 144**-0.5."""
    rounded = round(near, 9)
    return rounded if rounded > 0 and function(rounded) == value else near


def _type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _without_type(scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
