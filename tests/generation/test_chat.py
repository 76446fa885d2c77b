"""Conversations: the `chat` command with a scripted input against `generate`, streamed characters, what interrupts a reply."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_llm.cli.main import main
from megatron_llm.generation import chat
from megatron_llm.generation.chat import TextStream
from tests.families.cases import LLAMA, Case, make_folder
from tests.test_readme import prepare

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    "{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
NEW = "12"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("chat")
    prepare(path)
    (path / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    make_folder(Case("LlamaForCausalLM", {**LLAMA, "vocab_size": 400}), path / "hf")
    for file in (path / "tokenizer").iterdir():
        (path / "hf" / file.name).write_bytes(file.read_bytes())
    return path


def converse(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    assert main(["chat", "--hf", str(folder / "hf"), "--temperature", "0", "--max-new-tokens", NEW, *options]) == 0


def replies(folder: Path, conversations: list[list[tuple[str, str]]]) -> list[str]:
    """What `generate` says to conversations."""
    lines = [{"messages": [{"role": role, "content": text} for role, text in messages]} for messages in conversations]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out.jsonl"), "--max-new-tokens", NEW]
    assert main(["generate", "--hf", str(folder / "hf"), *arguments]) == 0
    return [json.loads(line)["reply"] for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_conversation_is_what_generate_makes_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, system = [("user", "hi")], [("system", "Be brief."), ("user", "hi")]
    (said,) = replies(folder, [first])
    then, other = replies(folder, [[*first, ("assistant", said), ("user", "and then?")], system])
    capsys.readouterr()
    converse(monkeypatch, folder, "hi\n\n  and then? \n/reset\nhi\n/system Be brief.\nhi\n/quit\nnever read\n")
    found = capsys.readouterr()
    assert found.out == f"{said}\n{then}\n{said}\n{other}\n" and len({said, then, other}) == 3
    assert "a new conversation, with this system message" in found.err
    converse(monkeypatch, folder, "hi\n", "--system", "Be brief.")
    assert capsys.readouterr().out == f"{other}\n"


def test_what_cannot_be_answered_is_said_and_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (said,) = replies(folder, [[("user", "hi")]])
    capsys.readouterr()
    converse(monkeypatch, folder, "bad\n/sytem x\n/usr/bin\n/reset\nhi")
    found = capsys.readouterr()
    assert found.out.endswith(f"{said}\n") and found.out.count("\n") >= 2, "a path is no command"
    assert "no bad words; the message is forgotten" in found.err and "/sytem is no command" in found.err


def test_ctrl_c_ends_the_reply_and_not_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []
    whole = chat.continuations

    def interrupted(model: Any, prompts: list[list[int]], **options: Any) -> Iterator[list[int | None]]:
        asked.append(prompts[0])
        for number, ids in enumerate(whole(model, prompts, **options)):
            if number == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield ids

    monkeypatch.setattr(chat, "continuations", interrupted)
    converse(monkeypatch, folder, "hi\nand then?\n")
    said = capsys.readouterr().out
    text = AutoTokenizer.from_pretrained(folder / "tokenizer").decode(asked[1])
    kept = text.removeprefix("user\nhi<|im_end|>\nassistant\n").split("<|im_end|>")[0]
    assert said.startswith(f"{kept}\n") and len(kept) > 0 and text.endswith("<|im_end|>\nuser\nand then?<|im_end|>\nassistant\n")


def test_characters_are_never_torn(folder: Path) -> None:
    """Every byte of these is a token of its own. What is really broken is shown in the end."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "Grüße, 世界! 👩‍👩‍👧 done"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) + 10
    stream = TextStream(tokenizer)
    pieces = [stream.put(id_) for id_ in [*ids, *tokenizer("<|im_end|>")["input_ids"]]]
    assert "".join(pieces) == text and stream.end() == ""
    assert not any("\ufffd" in piece for piece in pieces) and pieces.count("") > 10
    broken = TextStream(tokenizer)
    assert [broken.put(id_) for id_ in tokenizer("世")["input_ids"][:2]] == ["", ""] and broken.end() == "\ufffd"


def test_the_first_word_of_a_sentencepiece_text_has_no_space_and_the_others_have() -> None:
    class Pieces:
        """Decodes as sentencepiece does."""

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(["▁Hello", "▁wor", "ld", "▁and"][id_] for id_ in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(Pieces())
    assert [stream.put(id_) for id_ in range(4)] == ["Hello", " wor", "ld", " and"]


@pytest.mark.slow
def test_through_a_pipe(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron_llm", "chat", "--hf", str(folder / "hf"), "--temperature", "0"]
    done = subprocess.run(
        [*command, "--max-new-tokens", NEW], input="hi\n/nothing\n", capture_output=True, text=True, timeout=600
    )
    (said,) = replies(folder, [[("user", "hi")]])
    assert (done.returncode, done.stdout) == (0, f"{said}\n") and "is no command" in done.stderr
