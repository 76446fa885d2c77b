"""The architectures that can be read and written: every module of this package is one `FAMILY`, or several `FAMILIES`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.family import Family


@cache
def families() -> dict[str, Family]:
    """Every family by each of its architecture strings; Llama, the one that most readers know, comes first."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [family for module in modules for family in getattr(module, "FAMILIES", None) or (module.FAMILY,)]
    found.sort(key=lambda family: family.model_type != "llama")
    return {architecture: family for family in found for architecture in family.architectures}


def find_family(architecture: str) -> Family:
    """The family of an architecture. Raises ValueError listing those that are supported."""
    known = families()
    if architecture not in known:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(sorted(known))}")
    return known[architecture]


def describe(model: ModelConfig) -> tuple[Family, Mapping[str, Any]]:
    """The first family that has such a model, and its config.json. Raises ValueError saying why each has none."""
    reasons = []
    for family in dict.fromkeys(families().values()):
        try:
            return family, family.config(model)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("no Hugging Face architecture describes this model: " + "; ".join(reasons))
