"""Pieces of conversations against a reading of their messages: weights, cuts, counts and variants."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.chat_rows import VALIDATION, ConversationPieces, Loss, Variant
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.rows import Order, PackedRows
from tests.data.conversations import (
    CONVERSATIONS,
    META,
    Conversation,
    Expected,
    Message,
    epoch,
    expect,
    number_tokens,
    opened,
    write,
)

Folders = pytest.TempPathFactory


def packed(pieces: ConversationPieces, length: int, order: Order = "shuffled", packing: Any = "best_fit") -> PackedRows:
    return PackedRows(pieces, length, 3, order, packing)


@settings(max_examples=40, deadline=None)
@given(conversations=CONVERSATIONS, length=st.integers(4, 40))
def test_pieces_are_what_the_messages_say(tmp_path_factory: Folders, conversations: list[Conversation], length: int) -> None:
    dataset = opened(tmp_path_factory.mktemp("d") / "a", conversations)
    for train_on, prompt_weight in (("assistant", 0.0), ("assistant", 0.125), ("all", 0.0), *LAST):
        for overlong in ("drop", "truncate", "split_turns"):
            expected = expect(conversations, length, train_on, prompt_weight, overlong)
            _compare(dataset, expected, length, Loss(train_on, prompt_weight), overlong)


LAST = (("last_assistant", 0.0), ("last_assistant", 0.125))


def _compare(dataset: IndexedDataset, expected: Expected, length: int, loss: Loss, overlong: Any) -> None:
    if not expected.pieces:
        with pytest.raises(ValueError, match=f"none of {dataset.documents} conversations has a token to learn"):
            ConversationPieces(dataset, length, loss, overlong)
        return
    rows = packed(ConversationPieces(dataset, length, loss, overlong), length)
    for number in (0, 1):
        found = [piece for row in epoch(rows, number) for piece in row]
        assert Counter(found) == Counter(expected.pieces), (loss, overlong)
    again = f" + {expected.repeated} repeated" if expected.repeated else ""
    balance = f"{expected.total} tokens{again} = {expected.packed} packed + {expected.dropped} dropped"
    assert balance in rows.summary
    assert expected.total + expected.repeated == expected.packed + expected.dropped
    assert sum(map(int, re.findall(r"\((\d+) tokens\)", rows.summary))) == expected.dropped, "each reason with its number"
    share = expected.with_loss / expected.packed
    assert f"{expected.packed} tokens, {share:.2%} of them with loss, in {rows.rows_per_epoch} rows" in rows.summary


@settings(max_examples=30, deadline=None)
@given(conversations=CONVERSATIONS, length=st.integers(4, 40))
def test_validation_counts_every_token_of_a_reply_once(
    tmp_path_factory: Folders, conversations: list[Conversation], length: int
) -> None:
    """Weights above 0 are 1; what is not to be trained, or weighs nothing, is not measured either."""
    equal = [[dataclasses.replace(each, weight=float(each.weight > 0)) for each in talk] for talk in conversations]
    expected = expect(equal, length, "assistant", 0.0, "truncate")
    dataset = opened(tmp_path_factory.mktemp("d") / "a", conversations)
    if expected.pieces:
        found = epoch(packed(ConversationPieces(dataset, length, VALIDATION, "truncate"), length, "file"))
        assert Counter(piece for row in found for piece in row) == Counter(expected.pieces)


TALK = [
    Message("system", 3, bos=True),
    Message("user", 4),
    Message("assistant", 5, before=2, after=1),
    Message("user", 2),
    Message("user", 2),
    Message("assistant", 3, before=2, after=1),
    Message("tool", 3),
    Message("assistant", 2, before=2, after=1),
    Message("user", 20),
    Message("assistant", 2, before=2, after=1),
    Message("user", 1),
    Message("assistant", 1, before=2, after=1),
]
"""Head of 3 and turns of 12, 18, 25 and 5 tokens."""


def test_a_conversation_is_split_where_a_user_speaks(tmp_path: Path) -> None:
    """Rows of 24: the third turn fits none. With 33 all fit, the first two into one; BOS and system are before every part."""
    (tokens,) = number_tokens([TALK])
    ids = [token.id for token in tokens]
    dataset = opened(tmp_path / "a", [TALK])
    pieces = ConversationPieces(dataset, 24, Loss(), "split_turns")
    assert [pieces.read(number).tokens.tolist() for number in range(3)] == [ids[:15], ids[:3] + ids[15:33], ids[:3] + ids[58:]]
    assert pieces.summary.startswith("1 conversations in 3 parts, 44 tokens,")
    assert pieces.note == (
        "; 63 tokens + 6 repeated = 44 packed + 25 dropped, 1 longer than 24 tokens split into 3, "
        "1 turns longer than a row dropped (25 tokens)"
    )
    pieces = ConversationPieces(dataset, 33, Loss("all"), "split_turns")
    read = [pieces.read(number) for number in range(2)]
    assert [piece.tokens.tolist() for piece in read] == [ids[:33], ids[:3] + ids[33:]]
    assert read[1].weights.tolist() == [0.0] * 2 + [1.0] * 30, "a head is trained once, where it stands in the file"
    assert sum(len(piece.labels) for piece in read) == 32 + 32


def test_turns_that_begin_with_bos_have_no_head(tmp_path: Path) -> None:
    """As with the template of Llama 2, where a head before them would be a second BOS."""
    talk = [
        Message("user", 5, bos=True),
        Message("assistant", 3, before=1),
        Message("user", 5, bos=True),
        Message("assistant", 3, before=1),
    ]
    pieces = ConversationPieces(opened(tmp_path / "a", [talk]), 9, Loss(), "split_turns")
    assert [pieces.read(number).tokens.tolist() for number in (0, 1)] == [[1, *range(2, 10)], [1, *range(10, 18)]]
    assert "split into 2 (1 without the head, as their turns begin with BOS)" in pieces.note


def test_a_cut_never_leaves_a_conversation_without_a_trained_token(tmp_path: Path) -> None:
    talk = [Message("user", 10), Message("assistant", 5, before=1)]
    dataset = opened(tmp_path / "a", [talk, talk, [Message("user", 2), *talk[1:]]])
    pieces = ConversationPieces(dataset, 11, Loss(), "truncate")
    assert len(pieces.lengths) == 1
    assert "40 tokens = 8 packed + 32 dropped, 2 longer than 11 tokens cut (10 tokens)" in pieces.note
    assert "2 without a token to learn left out (22 tokens)" in pieces.note
    assert len(ConversationPieces(dataset, 12, Loss(), "truncate").lengths) == 3
    assert len(ConversationPieces(dataset, 11, Loss("assistant", 0.1), "truncate").lengths) == 3


def test_over_long_conversations_are_an_error_by_default(tmp_path: Path) -> None:
    dataset = opened(tmp_path / "a", [TALK[:3], TALK])
    message = r"record 1 \(counted from 0\) has 63 tokens.* 1 of 2 records are too long.* drop, truncate or split_turns"
    with pytest.raises(ValueError, match=message):
        ConversationPieces(dataset, 40, Loss(), "error")


def test_roles_say_who_speaks_every_label(tmp_path: Path) -> None:
    pieces = ConversationPieces(opened(tmp_path / "a", [TALK]), 33, Loss(), "split_turns")
    roles = pieces.read(1).roles
    assert roles is not None and roles.tolist() == [1] * 2 + [2] * 20 + [0] * 2 + [3] * 2 + [0] + [2] + [0] * 2 + [3] + [0]


@pytest.mark.parametrize("byte", [0b0000_0101, 0b0101_0011])
def test_role_bytes_without_a_meaning_are_refused(tmp_path: Path, byte: int) -> None:
    """Role 5, and a weight that the description lacks."""
    path = write(tmp_path / "a", [TALK])
    found = bytearray(Path(path + ".roles.bin").read_bytes())
    found[20] = byte
    Path(path + ".roles.bin").write_bytes(found)
    for train_on in ("assistant", "all", "last_assistant"):
        with pytest.raises(ValueError, match=rf"a\.roles\.bin has {byte} at byte 20, which is no role with a weight"):
            ConversationPieces(IndexedDataset(path), 63, Loss(train_on), "error")


def test_weights_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for weights in ((), (1.0, -1.0), (1.0, float("inf")), (1.0,) * 17):
        path = write(tmp_path / "a", [TALK], meta=dataclasses.replace(META, weights=weights))
        with pytest.raises(ValueError, match="must be 1 to 16 numbers|is not a data set description"):
            ConversationPieces(IndexedDataset(path), 63, Loss(), "error")


def short(count: int, extra: int = 0) -> list[Conversation]:
    return [[Message("user", 1 + number % 3), Message("assistant", 2 + extra, before=1)] for number in range(count)]


class Replaced:
    """Which of 4000 conversations are whose, as pieces: 0 the original, 1 and 2 the variants, of which every fifth has none."""

    COUNT = 4000

    def __init__(self, folder: Path):
        self.base = opened(folder / "a", short(self.COUNT))
        self.variants = []
        for number, name in enumerate(("flip", "predict_instruction"), start=1):
            talks = [[] if at % 5 == number else talk for at, talk in enumerate(short(self.COUNT, extra=number))]
            self.variants.append(opened(folder / f"a.{name}", talks, first=number * 100_000))

    def __call__(self, rates: tuple[float, float], seed: int, length: int = 16) -> np.ndarray:
        variants = [Variant(str(number), *each) for number, each in enumerate(zip(self.variants, rates, strict=True))]
        pieces = ConversationPieces(self.base, length, Loss(), "error", variants, seed)
        assert len(pieces.lengths) == self.COUNT
        firsts = np.array([pieces.read(number).tokens[0] for number in range(self.COUNT)])
        return firsts // 100_000


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: Folders) -> Replaced:
    return Replaced(tmp_path_factory.mktemp("variants"))


def test_variants_replace_at_their_rates(replaced: Replaced) -> None:
    """Four fifths of the chosen ones have the variant: 20 % and 40 % of all are replaced. Four standard deviations."""
    count = replaced.COUNT
    for seed in range(3):
        found = replaced((0.25, 0.5), seed)
        for number, rate in ((1, 0.25), (2, 0.5)):
            candidates = np.arange(count) % 5 != number
            assert not (found[~candidates] == number).any(), "an empty document: the original stays"
            expected, spread = rate * candidates.sum(), (rate * (1 - rate) * candidates.sum()) ** 0.5
            assert abs((found == number).sum() - expected) < 4 * spread


def test_the_choice_is_a_function_of_the_seed(replaced: Replaced) -> None:
    found = replaced((0.25, 0.5), 7)
    assert np.array_equal(found, replaced((0.25, 0.5), 7, length=30)), "not of the rows"
    assert 0.2 < (found != replaced((0.25, 0.5), 8)).mean() < 0.8
    more = replaced((0.5, 0.5), 7)
    assert (more[found == 1] == 1).all(), "a higher rate replaces more, not others"
    assert np.isin(replaced((1.0, 0.0), 7)[np.arange(4000) % 5 != 1], 1).all()
    everything = replaced((0.5, 0.5), 7)
    assert (everything == 0).mean() < 0.25, "only what has no variant stays"


def test_a_variant_is_read_whole_with_its_own_roles_and_weights(tmp_path: Path) -> None:
    """Every conversation replaced: the rows are those of the variant alone, cut where it is to be cut."""
    talks = [TALK[:3], TALK, TALK[:6]]
    base, flipped = opened(tmp_path / "a", short(3)), opened(tmp_path / "b", talks, first=1000)
    pieces = ConversationPieces(base, 24, Loss("last_assistant", 0.5), "split_turns", [Variant("flip", flipped, 1.0)])
    alone = ConversationPieces(flipped, 24, Loss("last_assistant", 0.5), "split_turns")
    assert epoch(packed(pieces, 24)) == epoch(packed(alone, 24))
    expected = expect(talks, 24, "last_assistant", 0.5, "split_turns", number_tokens(talks, 1000))
    assert Counter(piece for row in epoch(packed(pieces, 24)) for piece in row) == Counter(expected.pieces)
    assert pieces.note.endswith("3 replaced by flip")


@pytest.mark.parametrize("packing", ["in_order", "none"])
def test_short_to_long(tmp_path: Path, packing: str) -> None:
    """Every epoch rises; what is equally long changes places between epochs; the number of rows stays."""
    rng = np.random.default_rng(5)
    talks = [[Message("user", int(n)), Message("assistant", int(n), before=1)] for n in rng.integers(1, 12, 300)]
    pieces = ConversationPieces(opened(tmp_path / "a", talks), 40, Loss(), "error")
    rows = packed(pieces, 40, "short_to_long", packing)
    lengths = sorted(len(ids) for ids in number_tokens(talks))
    epochs = [epoch(rows, number) for number in range(3)]
    for found in epochs:
        assert [len(ids) for row in found for ids, _ in row] == lengths
        for row, following in zip(found, found[1:], strict=False):
            assert packing == "none" or sum(len(ids) for ids, _ in row) + len(following[0][0]) > 40
        assert sorted(ids for row in found for ids, _ in row) == sorted(tuple(t.id for t in ids) for ids in number_tokens(talks))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[1] == epoch(packed(pieces, 40, "short_to_long", packing), 1)
    assert epoch(PackedRows(pieces, 40, 4, "short_to_long", packing), 0) != epochs[0]


@pytest.mark.parametrize(
    "order, packing, other_mates, other_order",
    [
        ("shuffled", "best_fit", True, True),
        ("shuffled", "in_order", False, True),
        ("shuffled", "none", False, True),
        ("file", "best_fit", False, False),
        ("file", "in_order", False, False),
        ("file", "none", False, False),
        ("short_to_long", "in_order", True, True),
        ("short_to_long", "none", False, True),
    ],
)
def test_epochs(tmp_path: Path, order: Any, packing: Any, other_mates: bool, other_order: bool) -> None:
    """Which conversations share a row, and the order of rows: whether they differ between epochs. Else the seed alone decides."""
    talks = [[Message("user", 1 + n % 4), Message("assistant", 2 + n % 3, before=1)] for n in range(60)]
    pieces = ConversationPieces(opened(tmp_path / "a", talks), 16, Loss(), "error")
    rows = packed(pieces, 16, order, packing)
    epochs = [epoch(rows, number) for number in (2, 0, 1)]
    assert epochs == [epoch(packed(pieces, 16, order, packing), number) for number in (2, 0, 1)], "in whatever order it is read"
    mates = [frozenset(frozenset(row) for row in each) for each in epochs]
    assert len(set(mates)) == (3 if other_mates else 1)
    assert len({tuple(map(tuple, each)) for each in epochs}) == (3 if other_order else 1)
    other = PackedRows(pieces, 16, 4, order, packing)
    assert (epoch(other, 0) != epochs[1]) == (order != "file" or packing == "best_fit")


def test_no_role_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [TALK])
    Path(path + ".roles.bin").unlink()
    with pytest.raises(ValueError, match=re.escape("a.roles.bin does not exist, so nobody knows which tokens to train")):
        ConversationPieces(IndexedDataset(path), 63, Loss(), "error")
