"""Writes docs/settings.md from the schema of a configuration, docs/commands.md from the command line.

Run `python docs/list_settings.py`, or `make docs`.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic.fields import FieldInfo  # noqa: E402

from megatron_llm.cli.main import build_parser  # noqa: E402
from megatron_llm.config import Config  # noqa: E402
from megatron_llm.config.section import Section  # noqa: E402

WRITTEN_BY = "<!-- written by docs/list_settings.py -->\n"
SETTINGS = """# Settings

A run is one YAML file with these sections; `section.key=value` behind the file's name replaces a value of it. Unknown keys are
refused, and all mistakes are named at once, before anything is started. `megatron-llm config show` prints a file with everything
filled in, `megatron-llm config schema` is this list as JSON schema.

"""
COMMANDS = """# Commands

`megatron-llm COMMAND`, or `python -m megatron_llm COMMAND`. `--debug` shows the traceback of an error. Exit codes: 0 done, 1 bad
input or a failed run, 2 usage, 75 stopped by a signal or the clock after saving.

"""


def settings() -> str:
    """A section of the page for every section of a configuration, a row for every key."""
    seen: dict[type[Section], str] = {}
    parts = [SETTINGS]
    for place, section in _sections(Config, ""):
        if section in seen:
            parts.append(f"## `{place}`\n\nThe same keys as of `{seen[section]}`.\n\n")
            continue
        seen[section] = place
        rows = [_row(name, field) for name, field in section.model_fields.items()]
        about = _prose((section.__doc__ or "").split("\n\nAttributes:")[0])
        title = f"## `{place}`" if place else "## Sections"
        table = ["| key | type | default | |", "|---|---|---|---|", *rows]
        parts.append("\n".join([title, "", about, "", *table]) + "\n\n")
    return WRITTEN_BY + "".join(parts).rstrip() + "\n"


def commands() -> str:
    """A section of the page for every command: its usage, then its arguments."""
    parser = build_parser()
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return WRITTEN_BY + COMMANDS + "\n".join(_command(name, one) for name, one in _leaves(subparsers))


def _sections(section: type[Section], place: str) -> Iterator[tuple[str, type[Section]]]:
    yield place, section
    for name, field in section.model_fields.items():
        inner, many = _section_in(field.annotation)
        if inner is not None:
            yield from _sections(inner, f"{place}.{name}".lstrip(".") + (".N" if many else ""))


def _section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for argument in typing.get_args(annotation):
        inner, many = _section_in(argument)
        if inner is not None:
            return inner, many or typing.get_origin(annotation) is list
    return None, False


def _row(name: str, field: FieldInfo) -> str:
    inner, many = _section_in(field.annotation)
    if field.is_required():
        default = "required"
    elif inner is not None and not many and field.default is not None:
        default = "as below"
    elif field.default is None:
        default = "unset"
    else:
        default = _code(_yaml(field.default))
    bounds = _bounds(field)
    kind = _type(field.annotation) + (f", {bounds}" if bounds else "")
    return f"| `{name}` | {kind} | {default} | {_prose(field.description or '')} |"


def _type(annotation: Any) -> str:
    """A type in words; `X | None` is X, since unset is the default of each such key."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " ".join(_code(str(value)) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin in (list, tuple):
        kinds = list(dict.fromkeys(_type(argument) for argument in arguments if argument is not ...))
        return f"list of {'sections' if kinds == ['section'] else ', '.join(kinds)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[annotation]


def _bounds(field: FieldInfo) -> str:
    words = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{words[name]} {getattr(one, name):g}" for one in field.metadata for name in words if hasattr(one, name)]
    return ", ".join(found)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    return str(value)


def _leaves(subparsers: Any) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for name, parser in subparsers.choices.items():
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if inner:
            yield from ((f"{name} {below}", one) for below, one in _leaves(inner[0]))
        else:
            yield name, parser


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    shown = [action for action in parser._actions if not {"-h", "--debug"} & set(action.option_strings)]
    rows = [f"| {_code(_spelled(action))} | {_prose((action.help or '') % vars(action))} |" for action in shown]
    about = [_prose(parser.description), ""] if parser.description else []
    table = ["| argument | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## `{name}`", "", *about, *table])


def _spelled(action: argparse.Action) -> str:
    """An argument as its usage would say it."""
    metavar = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    if action.nargs == 0:
        value = ""
    elif action.nargs in ("+", "*"):
        value = f"{value} ..."
    return f"{', '.join(action.option_strings)} {value}".strip()


def _prose(text: str) -> str:
    """Text for a cell or a paragraph: one line, in which only what stands between backticks is markup."""
    plain, *more = " ".join(text.replace("``", "`").split()).split("`")
    parts = [_plain(plain)]
    for code, words in zip(more[::2], more[1::2], strict=True):
        parts += [_code(code), _plain(words)]
    return "".join(parts)


def _plain(text: str) -> str:
    return re.sub(r"([*\[\]])", r"\\\1", _entities(text))


def _code(text: str) -> str:
    """Code in a cell. A bar would end the cell on code hosts, even there."""
    return f"<code>{_entities(text)}</code>" if "|" in text else f"`{text}`"


def _entities(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


PAGES = {"settings.md": settings, "commands.md": commands}


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
