"""The architectures that can be read and written: every module of this package is one `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_llm.hf.family import Family


def families() -> dict[str, Family]:
    """Every family by its architecture string."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.architecture: module.FAMILY for module in modules}


def find_family(architecture: str) -> Family:
    """The family of an architecture. Raises ValueError listing those that are supported."""
    known = families()
    if architecture not in known:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(sorted(known))}")
    return known[architecture]
