"""Reading one config.json for a family: defaults, other spellings, and a list of everything that cannot be supported.

Two spellings of rotary settings are alive. Until transformers 4: `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and
`partial_rotary_factor` at the top. Since 5: all inside `rope_parameters`. Both are read, with transformers' precedence; changes
are written in the spelling that is there. Called by `family.py` and the files of `families/`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
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

    Attributes:
        problems: why this engine cannot run it, a phrase each; whoever reads adds to them.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] = {}, aliases: Mapping[str, str] = {}):
        self.config, self.defaults, self.aliases = config, defaults, aliases
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

    def _spelling(self, key: str) -> str:
        """The name under which this config.json has a key."""
        if key in self.config:
            return key
        return next((other for other, name in self.aliases.items() if name == key and other in self.config), key)

    def notes(self) -> list[str]:
        """What holds for training with this config.json and may surprise, a sentence each."""
        rates = {key: value for key, value in self.config.items() if "drop" in key and isinstance(value, float) and value > 0}
        if not rates:
            return []
        listed = ", ".join(f"{key} {value:g}" for key, value in rates.items())
        return [f"training applies no dropout: {listed} in config.json travels along without effect"]

    def only(self, key: str, *supported: Any) -> None:
        """A problem unless the key is absent, null, or one of these values."""
        value = self.config.get(self._spelling(key))
        if value is None or any(value == one and type(value) is type(one) for one in supported):
            return
        self.problems.append(f"{key} {value!r} is not supported, only {' or '.join(repr(one) for one in supported)}")

    def activation(self, key: str) -> str:
        """ModelConfig.hidden_act of an activation by transformers' name."""
        name = self(key)
        if name not in ACTIVATIONS:
            self.problems.append(f"{key} {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS.get(name, "silu")

    def refuse_general(self, architectures: tuple[str, ...]) -> None:
        """What no family supports: quantized weights, code of the folder's own."""
        if self.config.get("quantization_config"):
            self.problems.append("quantization_config: quantized weights cannot be trained; take the unquantized model")
        auto_map = self.config.get("auto_map")
        code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
        if code is not None and str(code).rpartition(".")[2].lower() not in {name.lower() for name in architectures}:
            self.problems.append(f"auto_map: the model is code of the folder ({code}), which is never run")

    def put(self, key: str, value: Any) -> None:
        """Set a key of `patched`, in the spelling of this config.json."""
        self.patched[self._spelling(key)] = value

    def put_rope(self, keys: Mapping[str, Any]) -> None:
        """Set all rotary settings of `patched`, given in the spelling of transformers 4, where this config.json keeps them."""
        scaling = keys.get("rope_scaling")
        original = "original_max_position_embeddings"
        if original in self.config and scaling:  # beside rope_scaling it wins
            self.patched[original] = scaling.get(original)
        if "rope_parameters" not in self.config:
            self.patched |= keys
            return
        self.patched.pop("rope_scaling", None)
        old = self.config["rope_parameters"]
        nested = {name: dict(value) for name, value in old.items() if isinstance(value, dict)}
        partial = {"partial_rotary_factor": keys.get("partial_rotary_factor", old.get("partial_rotary_factor"))}
        new = {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": keys["rope_theta"],
            **{name: value for name, value in partial.items() if value is not None},
        }
        if nested:
            nested["full_attention"] = new
            nested["sliding_attention"]["rope_theta"] = keys["rope_local_base_freq"]
        self.patched["rope_parameters"] = nested or new

    def rope(self, head_dim: int | None = None, parameters: Any = None) -> dict[str, Any]:
        """rope_theta, rope_scaling and, if `head_dim` is given, rotary_dim.

        parameters: what stands for `rope_parameters`, where layers of several sorts have their own.
        """
        rope = parameters or self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            self.problems.append(f"rope_scaling must be a mapping, got {rope!r}")
            rope = {}
        if any(isinstance(value, dict) for value in rope.values()):
            self.problems.append(f"rope_parameters of their own for {', '.join(rope)} are not supported")
            rope = {}
        theta = rope.get("rope_theta") or self.config.get("rope_theta") or self.defaults.get("rope_theta") or 10000.0
        fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": self._scaling(rope)}
        key = "partial_rotary_factor"
        partial = next((x for x in (rope.get(key), self.config.get(key), self.defaults.get(key)) if x is not None), 1.0)
        if head_dim is not None:
            fields["rotary_dim"] = int(head_dim * partial)
        elif partial != 1.0:
            self.problems.append(f"{key} {partial} is not supported, only 1.0")
        return fields

    def _scaling(self, rope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fields of RopeScalingConfig, None for plain rotation."""
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return None
        if kind == "su":  # longrope's first name
            kind = "longrope"
        if kind not in _SCALING:
            self.problems.append(f"rope type {kind!r} is not supported, only default, {', '.join(_SCALING)}")
            return None
        values = {key: rope[key] for key in _SCALING[kind] if rope.get(key) is not None}
        context = self("max_position_embeddings")
        if kind == "dynamic":
            values["original_max_position_embeddings"] = context
        elif kind != "linear":  # transformers lets the value beside rope_scaling win, and falls back to the whole context
            original = self.config.get("original_max_position_embeddings")
            values["original_max_position_embeddings"] = original or rope.get("original_max_position_embeddings") or context
            self._attention_factor(kind, rope, values, context)
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
            scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
            scales = (scale, all_dim) if scale and all_dim else (1.0, 0.0)
            above, below = (0.1 * one * math.log(factor) + 1.0 if factor > 1 else 1.0 for one in scales)
            values.setdefault("attention_factor", above / below)
        elif kind == "longrope":
            default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            values.setdefault("attention_factor", default)


def activation_name(model: Any) -> str:
    """transformers' name of ModelConfig.hidden_act."""
    return "gelu_pytorch_tanh" if model.hidden_act == "gelu_tanh" else str(model.hidden_act)


def rope_keys(model: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling as config.json says them, without the fields that the type does not use."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    names = [key for key in _SCALING[scaling.rope_type] if scaling.rope_type != "dynamic" or key == "factor"]
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": {"rope_type": scaling.rope_type, **scaling.model_dump(include=set(names))},
    }
