"""The pages for those who come from elsewhere: what they name on our side exists, and their configurations load."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_llm.cli.main import build_parser, main
from megatron_llm.config import Config
from megatron_llm.config.load import _section_type
from tests.test_readme import ROOT, blocks

PAGES = ["docs/from_megatron.md", "docs/from_axolotl.md"]
KEY = re.compile(r"([a-z_]+(?:\.[A-Za-z_]+)*)(?:: (.+))?")


def wrong_key(text: str) -> str | None:
    """What is wrong with `section.key` or `section.key: value`, N standing for a place in a list."""
    path, value = KEY.fullmatch(text).groups()  # type: ignore[union-attr]
    section: Any = Config
    names = [name for name in path.split(".") if name != "N"]
    for name in names:
        if section is None or name not in section.model_fields:
            return f"{text}: there is no {name}"
        field = section.model_fields[name]
        section = _section_type(field.annotation)
    if value is None:
        return None
    try:
        TypeAdapter(Annotated[field.annotation, field]).validate_python(yaml.safe_load(value))
    except ValidationError:
        return f"{text}: {value} is no value of it"
    return None


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def wrong_command(text: str) -> str | None:
    """What is wrong with `megatron-llm COMMAND --option ...`."""
    _, name, *words = text.split()
    if name not in parsers():
        return f"{text}: there is no {name}"
    missing = [word for word in words if word.startswith("--") and word not in parsers()[name]._option_string_actions]
    return f"{text}: there is no {missing}" if missing else None


def cells(page: str) -> list[tuple[str, str, str]]:
    """The rows of tables that say what is what: there, here, remark."""
    rows: list[tuple[str, str, str]] = []
    inside = False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif re.match(r"\| (there|`tools/)", line) and not inside:
            inside = True
        elif inside and not line.startswith("|---"):
            there, here, remark = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append((there, here, remark))
    return rows


def problems(page: str) -> list[str]:
    found = []
    for there, here, remark in cells(page):
        spans = re.findall(r"`([^`]+)`", here)
        if not spans and not here.startswith("not here"):
            found.append(f"{there}: the column here says nothing")
        for text in spans + [span for span in re.findall(r"`([^`]+)`", remark) if span.split(".")[0] in Config.model_fields]:
            if text.startswith("megatron-llm "):
                found.append(wrong_command(text) or "")
            elif KEY.fullmatch(text):
                found.append(wrong_key(text) or "")
            elif text in here:
                found.append(f"{text}: neither a key nor a command")
    return [problem for problem in found if problem]


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_here_exists(page: str) -> None:
    assert len(cells(page)) > 70
    assert problems(page) == []


def test_what_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [
        "`optimizer.learning_rate`", "`optimizer.name: adam`", "`megatron-llm convert`", "`megatron-llm train --lr`", "the same",
        "`--lr`", "`data.train.N.share`", "`training.steps`",
    ]  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("| there | here | |\n|---|---|---|\n" + "".join(f"| a | {row} | `data.trains` |\n" for row in rows))
    assert len(problems(str(page))) == (len(rows) - 1) + len(rows)  # all but the last, and every remark


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama for long rows with the vocabulary of Llama 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=131072,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "page, number", [("docs/from_megatron.md", 0), ("docs/from_megatron.md", 1), ("docs/from_axolotl.md", 0)]
)
def test_the_configurations_load(page: str, number: int, llama: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As `megatron-llm config show` says, and with a layout that eight GPUs have."""
    from megatron_llm.training.resolve import layout_problems, load_config

    text = blocks("yaml", page)[number].replace("hf: llama", f"hf: {llama}")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert main(["config", "show", str(file)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    for section, settings in yaml.safe_load(text).items():
        assert shown[section].keys() >= settings.keys()
    assert layout_problems(load_config(file).config, 8) == []
