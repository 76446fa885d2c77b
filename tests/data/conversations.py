"""Conversations as messages, and what should be trained of them and where they may be cut, by reading the messages one by one.

The package knows ids and role bytes alone; what it makes of them is compared with what is said here. Ids count up over a data
set, so a token says where it is from; id 0 fills rows and id 1 is BOS.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from megatron_llm.data.indexed import NOT_TRAINED, ROLES, WEIGHT_SHIFT, DatasetMeta, IndexedDataset
from megatron_llm.data.rows import PackedRows, Row
from megatron_llm.data.writer import StagedFiles, publish

BOS = 1
WEIGHTS = (1.0, 0.25, 2.0, 0.0)
META = DatasetMeta(kind="chat", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=1 << 20, bos_id=BOS, weights=WEIGHTS)


@dataclass(frozen=True)
class Message:
    """`before`, `after`: tokens around a reply that belong to nobody. `bos`: it begins with BOS."""

    role: str
    tokens: int
    train: bool = True
    weight: float = 1.0
    before: int = 0
    after: int = 0
    bos: bool = False


@dataclass(frozen=True)
class Token:
    """Of the message with this number; `template`: it belongs to nobody."""

    id: int
    message: int
    template: bool


Conversation = list[Message]


def number_tokens(conversations: Sequence[Conversation], first: int = 2) -> list[list[Token]]:
    ids = itertools.count(first)
    return [
        [
            Token(BOS if message.bos and place == 0 else next(ids), number, template)
            for number, message in enumerate(conversation)
            for place, template in enumerate([True] * message.before + [False] * message.tokens + [True] * message.after)
        ]
        for conversation in conversations
    ]


def write(prefix: Path, conversations: Sequence[Conversation], first: int = 2, meta: DatasetMeta = META) -> str:
    """Empty conversations, which variants of data sets have, become documents without tokens."""
    numbered = number_tokens(conversations, first)
    ids, roles = [], []
    for conversation, tokens in zip(conversations, numbered, strict=True):
        ids += [token.id for token in tokens]
        roles += [0 if token.template else _role_byte(conversation[token.message]) for token in tokens]
    files = StagedFiles(prefix, np.int32, roles=True)
    files.cut(0, 0)
    assert files.roles is not None
    files.bin.write(np.array(ids, "<i4").tobytes())
    files.idx.write(np.array([len(tokens) for tokens in numbered], "<i4").tobytes())
    files.roles.write(bytes(roles))
    files.finish(dataclasses.replace(meta, documents=len(numbered), tokens=len(ids), max_token_id=max(ids)))
    files.close(keep=True)
    publish(prefix, roles=True, meta=True)
    return str(prefix)


def _role_byte(message: Message) -> int:
    return ROLES[message.role] | NOT_TRAINED * (not message.train) | WEIGHTS.index(message.weight) << WEIGHT_SHIFT


def weight(conversation: Conversation, token: Token, train_on: str, prompt_weight: float) -> float:
    """Of the prediction of a token."""
    if token.template:
        return 1.0 if train_on == "all" else prompt_weight
    message = conversation[token.message]
    if not message.train:
        return 0.0
    last = max(number for number, each in enumerate(conversation) if each.role == "assistant" or number == 0)
    trained = {
        "all": True,
        "assistant": message.role == "assistant",
        "last_assistant": message.role == "assistant" and token.message == last,
    }[train_on]
    return message.weight * (1.0 if trained else prompt_weight)


def turns(conversation: Conversation, tokens: list[Token]) -> tuple[list[Token], list[list[Token]]]:
    """(BOS and system messages at the start, the tokens of each turn). A turn begins where a user speaks after a reply or a tool,
    or a system message that introduces the user."""
    first = next((number for number, message in enumerate(conversation) if message.role != "system"), len(conversation))
    head = [token for place, token in enumerate(tokens) if token.message < first or (place == 0 and token.id == BOS)]
    begins = set()
    for number in range(first + 1, len(conversation)):
        if conversation[number].role not in ("user", "system") or conversation[number - 1].role in ("user", "system"):
            continue
        block = itertools.takewhile(lambda message: message.role in ("user", "system"), conversation[number:])
        if any(message.role == "user" for message in block):
            begins.add(number)
    found: list[list[Token]] = [[]]
    for place, token in enumerate(tokens):
        if token.message in begins and tokens[place - 1].message != token.message:
            found.append([])
        found[-1].append(token)
    return head, found


@dataclass
class Expected:
    """What becomes of a data set: (ids, weights of the predictions) of each piece, and counts of tokens."""

    pieces: list[tuple[tuple[int, ...], tuple[float, ...]]] = dataclasses.field(default_factory=list)
    total: int = 0
    packed: int = 0
    dropped: int = 0
    repeated: int = 0
    with_loss: int = 0

    def add(self, head: list[Token], body: list[Token], conversation: Conversation, train_on: str, prompt_weight: float) -> None:
        weights = [0.0] * len(head) + [weight(conversation, token, train_on, prompt_weight) for token in body]
        ids = tuple(token.id for token in head + body)
        if any(weights[1:]):
            self.pieces.append((ids, tuple(weights[1:])))
            self.packed += len(ids)
            self.repeated += len(head)
            self.with_loss += sum(each != 0 for each in weights[1:])
        else:
            self.dropped += len(body)


def expect(
    conversations: Sequence[Conversation],
    length: int,
    train_on: str,
    prompt_weight: float,
    overlong: str,
    numbered: list[list[Token]] | None = None,
) -> Expected:
    found = Expected()
    for conversation, tokens in zip(conversations, numbered or number_tokens(conversations), strict=True):
        found.total += len(tokens)
        if len(tokens) <= length or overlong == "truncate":
            found.dropped += len(tokens[length:])
            found.add([], tokens[:length], conversation, train_on, prompt_weight)
        elif overlong == "drop":
            found.dropped += len(tokens)
        else:
            for head, body, fits in _parts(conversation, tokens, length):
                if fits:
                    found.add(head, body, conversation, train_on, prompt_weight)
                else:
                    found.dropped += len(body)
    return found


def _parts(conversation: Conversation, tokens: list[Token], length: int) -> Iterator[tuple[list[Token], list[Token], bool]]:
    head, left = turns(conversation, tokens)
    while left:
        repeated = [] if left[0] is not None and (left[0][0] is tokens[0] or left[0][0].id == BOS) else head
        count = max((n for n in range(len(left) + 1) if len(repeated) + sum(map(len, left[:n])) <= length), default=0)
        yield repeated, list(itertools.chain(*left[: count or 1])), count > 0
        left = left[count or 1 :]


def segments(row: Row) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(ids, weights of the predictions within) of each piece of a row, what fills it left out."""
    for begin, end in itertools.pairwise([*row.starts.tolist(), len(row.tokens)]):
        ids, weights = row.tokens[begin:end].tolist(), row.weights[begin:end].tolist()
        if ids[0] == 0:
            assert end == len(row.tokens) and not any(ids) and not any(weights)
            continue
        assert weights[-1] == 0, "the last token predicts nothing of another conversation"
        assert row.labels[begin : end - 1].tolist() == ids[1:]
        yield tuple(ids), tuple(weights[:-1])


def epoch(rows: PackedRows, number: int = 0) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]]:
    count = rows.rows_per_epoch
    return [list(segments(rows.row(row))) for row in range(number * count, (number + 1) * count)]


def opened(prefix: Path, conversations: Sequence[Conversation], first: int = 2) -> IndexedDataset:
    return IndexedDataset(write(prefix, conversations, first), vocab_size=1 << 20)


def _replies(**fields: object) -> st.SearchStrategy[Message]:
    around = {"before": st.integers(1, 3), "after": st.integers(0, 2)}
    return st.builds(Message, st.just("assistant"), st.integers(1, 9), **_marks(), **around)


def _marks() -> dict[str, st.SearchStrategy[object]]:
    return {"train": st.sampled_from([True, True, True, False]), "weight": st.sampled_from([1.0, 1.0, *WEIGHTS])}


def _with_bos(conversation: Conversation, where: str) -> Conversation:
    """BOS in front of the conversation, or of every turn of a user."""
    begins = {0} if where == "first" else set()
    if where == "turns":
        replies = ("assistant", "tool")
        begins = {0} | {
            number
            for number in range(1, len(conversation))
            if conversation[number].role in ("user", "system") and conversation[number - 1].role in replies
        }
    if where == "apart":  # and nobody's
        return [dataclasses.replace(conversation[0], before=conversation[0].before or 1, bos=True), *conversation[1:]]
    return [
        dataclasses.replace(message, tokens=message.tokens + (message.before == 0), bos=True) if number in begins else message
        for number, message in enumerate(conversation)
    ]


CONVERSATIONS = st.lists(
    st.builds(
        _with_bos,
        st.lists(
            st.one_of(
                st.builds(Message, st.sampled_from(["user", "user", "system", "tool"]), st.integers(1, 6), **_marks()),
                _replies(),
            ),
            min_size=1,
            max_size=9,
        ),
        st.sampled_from(["first", "apart", "turns", "none"]),
    ),
    min_size=1,
    max_size=6,
)
