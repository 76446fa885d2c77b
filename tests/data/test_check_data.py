"""What `check_data` and the config refuse about data, each with one clear sentence."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.config import ConfigError
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.stream import check_data
from megatron_llm.data.writer import IndexedWriter
from tests.data.sources import DOCUMENTS, META, make_config, write_chat, write_pretrain


def test_no_token_is_read_at_the_start_with_a_meta_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(self: IndexedDataset, vocab_size: int) -> int:
        raise AssertionError("scanned")

    monkeypatch.setattr(IndexedDataset, "find_outside", scan)
    assert check_data(make_config(train=[{"path": write_pretrain(tmp_path / "a", DOCUMENTS)}])) == []
    with pytest.raises(AssertionError, match="scanned"):
        check_data(make_config(train=[{"path": write_pretrain(tmp_path / "b", DOCUMENTS, meta=None)}]))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    good = write_pretrain(tmp_path / "good", DOCUMENTS)
    short = write_pretrain(tmp_path / "short", [8])
    cut = write_pretrain(tmp_path / "cut", DOCUMENTS)
    Path(cut + ".bin").write_bytes(Path(cut + ".bin").read_bytes()[:-1])
    bad = write_pretrain(tmp_path / "bad", DOCUMENTS)
    Path(bad + ".idx").write_bytes(b"something else")
    no_bin = write_pretrain(tmp_path / "no_bin", DOCUMENTS)
    Path(no_bin + ".bin").unlink()
    large = write_pretrain(tmp_path / "large", [20], first=81, meta=None)
    paths = [good, short, cut, bad, no_bin, large, str(tmp_path / "none")]
    problems = check_data(
        make_config(vocab_size=98, train=[{"path": path} for path in paths], valid=[{"path": good}, {"path": good}])
    )
    expected = [
        "data.valid: 2 sets are called 'good'",
        "data.train.1.path: .*short has 8 tokens, but one row takes 9",
        r"data.train.2.path: .*cut\.bin has 391 bytes, but .* describes 392",
        r"data.train.3.path: .*bad\.idx is not a token index",
        r"data.train.4.path: .*no_bin\.bin does not exist",
        r"data.train.5.path: .*large\.bin has token id 98 at byte 68 and ids up to 100, but model.vocab_size is 98; .*least 101",
        r"data.train.6.path: .*none\.idx does not exist",
    ]
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem), problem


def test_no_two_validation_sets_have_one_name_in_the_metrics(tmp_path: Path) -> None:
    """`valid_loss/a/user` is what users say in the chat set a."""
    path, (chat, _) = write_pretrain(tmp_path / "text", DOCUMENTS), write_chat(tmp_path / "chat", [8])
    sets = [{"path": chat, "kind": "chat", "name": "a"}, {"path": path, "name": "b"}]
    others = [{"path": path, "name": name} for name in ("a/user", "a/none/tool", "b/user", "user")]
    (problem,) = check_data(make_config(train=[{"path": path}], valid=[*sets, *others]))
    assert problem == "data.valid: the metrics of 'a/user' would be called as those of user in 'a'; rename one"


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    chat, _ = write_chat(tmp_path / "c", [8])
    (problem,) = check_data(make_config(train=[{"path": path}], packing="in_order"))
    assert "data.packing: in_order does not go with data.kind pretrain; use one of: auto, concat, best_fit" in problem
    (problem,) = check_data(make_config(train=[{"path": path}], packing="best_fit", training={"document_isolation": False}))
    assert "document_isolation: false does not go with data.packing best_fit" in problem
    for kind in ({"packing": "best_fit"}, {"kind": "chat", "train": [{"path": chat}]}):
        (problem,) = check_data(make_config(**{"train": [{"path": path}], "boundary_loss": "trained", **kind}))
        assert "boundary_loss: trained needs pretraining data with packing concat" in problem
    (problem,) = check_data(make_config(kind="chat", train=[{"path": chat}], packing="concat"))
    assert "use one of: auto, best_fit, in_order, none" in problem
    (problem,) = check_data(make_config(kind="chat", train=[{"path": path}]))
    assert "a.roles.bin does not exist" in problem
    (problem,) = check_data(make_config(kind="chat", train=[{"path": chat}], training={"document_isolation": False}))
    assert "training.document_isolation" in problem
    mixed = [{"path": path}, {"path": chat, "kind": "chat"}]
    (problem,) = check_data(make_config(train=mixed, training={"document_isolation": False}))
    assert "where the conversations of a row never see each other" in problem
    for sections in (
        {"kind": "chat", "train": [{"path": chat}], "packing": "auto"},
        {"train": mixed},
        {"train": [{"path": path}], "packing": "best_fit"},
    ):
        problems = check_data(make_config(order="megatron", **sections))
        assert any("data.order: megatron is for data.kind pretrain with packing concat" in problem for problem in problems)
    (problem,) = check_data(make_config(order="megatron", train=[{"path": path, "epochs": 2}]))
    assert "data.order: megatron blends by weight" in problem
    (problem,) = check_data(make_config(order="megatron", megatron_split="1;2", train=[{"path": path}]))
    assert problem.startswith("data.train.0.path: data.megatron_split: '1;2'")
    (problem,) = check_data(make_config())
    assert "data.train: lists no data set" in problem


def test_largest_vocabulary_id_is_allowed(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    assert check_data(make_config(vocab_size=98, train=[{"path": path}])) == []
    assert len(check_data(make_config(vocab_size=97, train=[{"path": path}]))) == 1


def test_weights_and_epochs_do_not_mix(tmp_path: Path) -> None:
    for sections, message in (
        ({"train": [{"path": "a", "epochs": 1}, {"path": "b"}]}, "train.0 has epochs and train.1 has not"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}]}, "train.1 has epochs and train.0 has not"),
        ({"train": [{"path": "a", "weight": 1, "epochs": 1}]}, "weight 1.0 and epochs 1.0 both say"),
        ({"valid": [{"path": "a"}, {"path": "b", "epochs": 1}]}, "valid.1 has weight or epochs"),
        ({"train": [{"path": "a", "epochs": 0}]}, "data.train.0.epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(**sections)


def test_shares_that_a_blend_cannot_keep_are_refused(tmp_path: Path) -> None:
    a = write_pretrain(tmp_path / "a", [8 * 4 + 1])
    b = write_pretrain(tmp_path / "b", [8 * 50 + 1], first=1000)
    assert check_data(make_config(train=[{"path": a, "weight": 10}, {"path": b, "weight": 65536}])) == []
    (problem,) = check_data(make_config(train=[{"path": a, "weight": 1.5}, {"path": b, "weight": 65536}]))
    assert re.match(r"data\.train\.0: its share of the rows, 2.29e-05, would become [12]/65536 .* more than 10% off", problem)
    (problem,) = check_data(make_config(train=[{"path": a, "epochs": 0.001}, {"path": b, "epochs": 100}]))
    assert "data.train.0: its share" in problem


def test_data_of_different_tokenizers_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(META, tokenizer="other", tokenizer_fingerprint="0" * 64)
    a = write_pretrain(tmp_path / "a", DOCUMENTS)
    b = write_pretrain(tmp_path / "b", DOCUMENTS, meta=other)
    c = write_pretrain(tmp_path / "c", DOCUMENTS, meta=None)
    assert check_data(make_config(train=[{"path": c}, {"path": a}], valid=[{"path": a}])) == []
    (problem,) = check_data(make_config(train=[{"path": c}, {"path": a}], valid=[{"path": b}]))
    assert problem.startswith("data.valid.0.path: made with tokenizer other (fingerprint 000000000000), but ")
    assert "data.train.1.path with tok (ffffffffffff); preprocess all with one tokenizer" in problem


def test_settings_of_conversations_need_conversations(tmp_path: Path) -> None:
    text = [{"path": write_pretrain(tmp_path / "a", DOCUMENTS)}]
    talks = [{"path": write_chat(tmp_path / "c", [8])[0], "kind": "chat"}]
    for setting, value in (
        ("train_on", "all"),
        ("train_on", "last_assistant"),
        ("prompt_loss_weight", 0.1),
        ("conversation_augment", {"flip": 0.1}),
        ("overlong", "drop"),
    ):
        for sections in ({"train": text}, {"kind": "synthetic"}):
            (problem,) = check_data(make_config(**{setting: value}, **sections))
            assert problem.startswith(f"data.{setting}: ") and problem.endswith("; remove it, or set kind: chat")
        (*problem,) = check_data(make_config(**{setting: value}, train=text, valid=talks))
        assert len(problem) == (setting != "overlong"), "validation has over-long conversations, too, and is never augmented"
        if setting != "conversation_augment":
            assert check_data(make_config(**{setting: value}, train=[*text, *talks])) == []


def test_a_curriculum_needs_conversations_of_all_sources(tmp_path: Path) -> None:
    text = {"path": write_pretrain(tmp_path / "a", DOCUMENTS)}
    talks = {"path": write_chat(tmp_path / "c", [8])[0], "kind": "chat"}
    for train, packing in (([text], "auto"), ([text], "best_fit"), ([text, talks], "auto")):
        (problem,) = check_data(make_config(train=train, packing=packing, order="short_to_long"))
        assert "data.order: short_to_long sorts conversations, and data.train has kind pretrain" in problem
    (problem,) = check_data(make_config(kind="synthetic", order="short_to_long"))
    assert "has kind synthetic" in problem
    (problem,) = check_data(make_config(train=[talks], packing="best_fit", order="short_to_long"))
    assert "packing best_fit puts short conversations beside long ones; remove data.packing, or set it to in_order" in problem
    for packing in ("auto", "in_order", "none"):
        assert check_data(make_config(train=[talks], packing=packing, order="short_to_long", valid=[text])) == []


@pytest.mark.parametrize(
    "data, said",
    [
        ({"train_on": "all", "prompt_loss_weight": 0.5}, "prompt_loss_weight 0.5 says what train_on all says with 1: remove it"),
        ({"prompt_loss_weight": 1.5}, "data.prompt_loss_weight: Input should be less than or equal to 1"),
        (
            {"conversation_augment": {"flip": 0.6, "predict_instruction": 0.6}},
            "flip 0.6 and predict_instruction 0.6 are more",
        ),
        ({"conversation_augment": {"seed": 3}}, "seed 3 chooses nothing while all rates are 0"),
        ({"conversation_augment": {"flop": 0.6}}, "flop"),
    ],
)
def test_settings_of_conversations_that_contradict(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(kind="chat", **data)


def test_variants_that_are_missing_or_of_something_else_are_refused(tmp_path: Path) -> None:
    path, _ = write_chat(tmp_path / "c", [8, 8])

    def problem(rates: dict[str, float]) -> str:
        (found,) = check_data(make_config(kind="chat", train=[{"path": path}], conversation_augment=rates))
        return found

    found = problem({"predict_instruction": 0.1})
    assert found.startswith("data.train.0.path: data.conversation_augment.predict_instruction needs ")
    assert "c.predict_instruction.idx does not exist" in found
    assert f"make it with `megatron-llm preprocess-chat ... --output {path} --variants predict_instruction`" in found
    write_chat(tmp_path / "c.flip", [8])
    assert f"c.flip has 1 documents, but {path} has 2; make it with" in problem({"flip": 0.1})
    write_chat(tmp_path / "c.flip", [8, 8], first=99_990)
    assert "c.flip.bin has token id 100000 at byte 40" in problem({"flip": 0.1})
    write_pretrain(tmp_path / "c.flip", [8, 8])
    assert "c.flip.roles.bin does not exist" in problem({"flip": 0.1})
    with IndexedWriter(
        tmp_path / "c.flip", np.int32, dataclasses.replace(META, tokenizer_fingerprint="0" * 64), roles=True
    ) as writer:
        for _ in range(2):
            writer.add_document(np.arange(8), np.full(8, 3, np.uint8))
    assert f"c.flip was made with tokenizer 000000000000, but {path} with ffffffffffff; make it with" in problem({"flip": 0.1})
