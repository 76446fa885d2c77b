"""generation_config.json of models that conversations have trained: transformers stops at the end of a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from megatron_llm.hf.assets import CONFIG, GENERATION_CONFIG, collect_assets, with_reply_ends
from tests.families.cases import LLAMA, Case, make_folder
from tests.test_readme import prepare

EOS, END = 0, 1  # <|endoftext|>, <|im_end|>


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("ends")
    prepare(path)
    make_folder(Case("LlamaForCausalLM", {**LLAMA, "eos_token_id": 7, "bos_token_id": 5}), path / "hf")
    return collect_assets(path / "hf", path / "tokenizer")


def _read(content: bytes, folder: Path) -> dict[str, Any]:
    """As transformers reads it."""
    (folder / "generation_config.json").write_bytes(content)
    return GenerationConfig.from_pretrained(folder).to_dict()


def test_the_end_of_replies_is_added(assets: dict[str, bytes], tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 0.6, "eos_token_id": 7, "bos_token_id": 5, "transformers_version": "4.56.0"}
    for known in (7, [7, 9]):
        before = json.dumps(given | {"eos_token_id": known}).encode()
        after = with_reply_ends(assets | {GENERATION_CONFIG: before})
        expected = _read(before, tmp_path) | {"eos_token_id": [*(known if isinstance(known, list) else [known]), END]}
        assert _read(after.pop(GENERATION_CONFIG), tmp_path) == expected
        assert after == {name: content for name, content in assets.items() if name != GENERATION_CONFIG}


def test_without_the_file_the_models_config_counts(assets: dict[str, bytes], tmp_path: Path) -> None:
    without = {name: content for name, content in assets.items() if name != GENERATION_CONFIG}
    found = _read(with_reply_ends(without)[GENERATION_CONFIG], tmp_path)
    assert (found["eos_token_id"], found["bos_token_id"]) == ([7, END], 5)
    scratch = {name: content for name, content in without.items() if name != CONFIG}
    assert _read(with_reply_ends(scratch)[GENERATION_CONFIG], tmp_path)["eos_token_id"] == [EOS, END]


def test_what_is_right_already_stays_to_the_byte(assets: dict[str, bytes]) -> None:
    known = assets | {GENERATION_CONFIG: b'{"eos_token_id":  [1, 7]}'}
    assert with_reply_ends(known) == known
    untemplated = {name: content for name, content in assets.items() if "chat_template" not in name}
    settings = json.loads(untemplated["hf/tokenizer_config.json"])
    settings.pop("chat_template", None)
    untemplated["hf/tokenizer_config.json"] = json.dumps(settings).encode()
    assert with_reply_ends(untemplated) == untemplated
    assert with_reply_ends({CONFIG: b"{}"}) == {CONFIG: b"{}"}
    damaged = assets | {"hf/tokenizer.json": b"no tokenizer"}
    assert with_reply_ends(damaged) == damaged
