"""From YAML files and dotted overrides to a validated `Config`, with every mistake reported at once.

`training/resolve.py` calls `read_raw_config`, has `training/completion.py` complete the mapping, then calls `parse_config`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_llm.config.schema import Config


class ConfigError(ValueError):
    """One or more things a user must change before the run can start. `problems` holds a sentence for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.1 wants a dot) and refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looks for duplicates before merge keys (`<<: *anchor`) are expanded: an override of a merged key is none."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if (key_node.tag, key_node.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                    )
                seen.add((key_node.tag, key_node.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expands merge keys. Of equal keys the later one counts; PyYAML 6.0.4 leaves both, and merges the earlier one on."""
        super().flatten_mapping(node)
        last = {(key.tag, key.value): number for number, (key, _) in enumerate(node.value) if isinstance(key, yaml.ScalarNode)}
        node.value = [
            (key, value)
            for number, (key, value) in enumerate(node.value)
            if not isinstance(key, yaml.ScalarNode) or last[key.tag, key.value] == number
        ]


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_raw_config(path: str | Path, settings: list[str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, with what `settings` say put over it from left to right.

    settings: each `section.key=value` (values are YAML), or another file, whose mappings are merged key by key while its
        lists and plain values, null too, take the place of what was there.

    Raises ConfigError naming the file or the override when one cannot be read.
    """
    raw = _read_mapping(Path(path))
    problems = []
    for setting in settings or []:
        if "=" not in setting and setting.endswith((".yaml", ".yml")):
            try:
                _merge(raw, _read_mapping(Path(setting)))
            except ConfigError as error:
                problems += error.problems
        elif problem := _apply_override(raw, setting):
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return raw


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError([f"config file {path} {'is not a file' if path.exists() else 'does not exist'}"])
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"{path} must hold a mapping of sections, got {type(raw).__name__}"])
    return {key: _unshared(value) for key, value in raw.items()}


def _unshared(value: Any) -> Any:
    """A copy in which an alias (`*anchor`) has a value of its own: what is put over one place must not change another."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _merge(raw: dict[str, Any], over: dict[str, Any]) -> None:
    """Put `over` over `raw`, in place."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            _merge(raw[key], value)
        else:
            raw[key] = value


def _apply_override(raw: dict[str, Any], override: str) -> str | None:
    """Set one `a.b.0.c=value` in `raw` in place; numeric components index lists. Returns the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"override {override!r} is neither of the form section.key=value nor a file FILE.yaml"
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return f"override {override!r}: {text!r} is not a YAML value"
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return f"override {override!r}: {part!r} is not an index into a list of {len(node)}"
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            return f"override {override!r}: {part!r} lies below a plain value"
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return f"override {override!r}: cannot set {last!r} there"
    return None


def parse_config(raw: dict[str, Any]) -> Config:
    """Validate a raw mapping. Raises ConfigError with one sentence for every wrong, missing or unknown key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(sentences(error)) from error


def sentences(error: ValidationError) -> list[str]:
    """A sentence for every wrong, missing or unknown key of a section: where, what was given, what would be right."""
    return [_sentence(detail) for detail in error.errors()]


def _sentence(detail: Any) -> str:
    """One pydantic error as a sentence."""
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location) or "the configuration"
    if detail["type"] == "extra_forbidden":
        known = _field_names(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{where}: required, but not given"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail.get("input"), (dict, BaseModel)):
        return f"{where}: {message}"
    return f"{where}: {message} (got {detail.get('input')!r})"


def _field_names(location: list[str]) -> list[str]:
    """Names of the fields of the section at `location`, following lists and optional sections."""
    section: Any = Config
    for part in location:
        if part.isdigit():
            continue
        section = _section_type(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_type(annotation: Any) -> Any:
    """The BaseModel inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_type(argument)
        if found is not None:
            return found
    return None
