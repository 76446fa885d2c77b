"""`--template` and `--save-tokenizer`: what transformers makes of the tokenizer that is written is what the data holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_llm.data.chat_tokenizer import reply_end_ids
from megatron_llm.data.indexed import ROLES, IndexedDataset
from megatron_llm.data.prepare.chat import preprocess_chat
from megatron_llm.data.prepare.named_templates import read_template, template_names
from megatron_llm.data.tokenizer import fingerprint, load_decoder

MESSAGES = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": " one "},
    {"role": "assistant", "content": " two\n"},
    {"role": "user", "content": "three é"},
    {"role": "assistant", "content": "four 😀"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"place": {}}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "é"}}}
CALLS = [
    *MESSAGES[:2],
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "both", "tool_calls": [CALL]},
    {"role": "tool", "content": "snow"},
    {"role": "assistant", "content": "all"},
]
WITH_TOOLS = {"chatml", "llama3"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", template_names())
def test_the_written_tokenizer_makes_the_data(tmp_path: Path, make_tokenizer: Callable[..., Path], name: str) -> None:
    folder = make_tokenizer(chat_template=None, eos="</s>")
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    conversations = [(MESSAGES, None), (MESSAGES[1:], None)] + (
        [(CALLS, TOOLS), (CALLS[1:], TOOLS)] if name in WITH_TOOLS else []
    )
    source = write(tmp_path / "a.jsonl", *({"messages": messages, "tools": tools} for messages, tools in conversations))
    saved, prefix = tmp_path / "saved", tmp_path / "out"
    for _ in range(2):  # the second time all is there already
        preprocess_chat([source], folder, prefix, template=name, save_to=saved, strict=True, progress=False)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    reference, dataset = AutoTokenizer.from_pretrained(saved), IndexedDataset(prefix)
    assert dataset.meta is not None and dataset.roles is not None
    assert (dataset.meta.tokenizer, dataset.meta.tokenizer_fingerprint) == (str(saved), fingerprint(saved))
    assert dataset.meta.vocab_size == len(reference)
    assert {reference.eos_token_id} == reply_end_ids(reference)
    offsets = dataset.document_offsets()
    for number, (messages, tools) in enumerate(conversations):
        wanted = reference.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        roles = dataset.roles[offsets[number] : offsets[number + 1]]
        assert dataset.document(number).tolist() == wanted["input_ids"]
        assert (roles == ROLES["assistant"]).tolist() == (np.array(wanted["assistant_masks"]) == 1).tolist()
        shown = load_decoder(saved)(dataset.document(number).tolist())
        assert all(message["content"].strip() in shown for message in messages)
        prompt = reference.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
        assert reference.apply_chat_template(messages, tools=tools, tokenize=False).startswith(prompt)
    if name not in WITH_TOOLS:
        with pytest.raises(jinja2.TemplateError, match="no tools"):
            reference.apply_chat_template(MESSAGES, tools=TOOLS)


def test_missing_special_tokens_are_said_and_added(
    tmp_path: Path, make_tokenizer: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tokenizer(chat_template=None, eos="</s>")
    source = write(tmp_path / "a.jsonl", {"messages": MESSAGES})
    with pytest.raises(ValueError, match=r"phi3 writes .*<\|end\|>.*would be \d+ ordinary tokens\. --save-tokenizer DIR"):
        preprocess_chat([source], folder, tmp_path / "out", template="phi3", progress=False)
    size = len(AutoTokenizer.from_pretrained(folder))
    preprocess_chat([source], folder, tmp_path / "out", template="phi3", save_to=tmp_path / "saved", progress=False)
    said = capsys.readouterr().err
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert f"<|end|> {reference.convert_tokens_to_ids('<|end|>')}" in said
    assert f"model.resize_vocab: {len(reference)}" in said and len(reference) == size + 4
    assert "eos token: <|end|> instead of </s>" in said


def test_a_template_of_a_file_and_names_that_are_none(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": MESSAGES})
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}<|im_end|>{% endfor %}")
    preprocess_chat([source], tokenizer_folder, tmp_path / "out", template=str(file), progress=False)
    assert "keeps its own chat template" in capsys.readouterr().err
    text = load_decoder(tokenizer_folder)(IndexedDataset(tmp_path / "out").document(0).tolist())
    assert text.startswith("system> be good<|im_end|>user>  one <|im_end|>")
    with pytest.raises(ValueError, match="--template chatlm: known are alpaca, chatml, .*zephyr, or the path"):
        preprocess_chat([source], tokenizer_folder, tmp_path / "out", template="chatlm", progress=False)
    with pytest.raises(ValueError, match="none.jinja cannot be read"):
        read_template(str(tmp_path / "none.jinja"))


def test_a_folder_with_something_else_is_not_written_to(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": MESSAGES})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    for target, problem in ((tmp_path / "saved", "holds something else"), (tokenizer_folder, "is --tokenizer itself")):
        with pytest.raises(ValueError, match=problem):
            preprocess_chat([source], tokenizer_folder, tmp_path / "out", template="plain", save_to=target, progress=False)
