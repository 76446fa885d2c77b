"""Streams against brute force. Token ids of the test data are their own places, so a batch says where each token came from."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_llm.config import Config
from megatron_llm.data.indexed import NOT_TRAINED, IndexedDataset
from megatron_llm.data.megatron_order import MegatronBlend, MegatronRows, source_samples
from megatron_llm.data.stream import (
    TokenStream,
    build_train_stream,
    build_valid_streams,
    check_data,
    describe_data,
    steps_of_epochs,
)
from megatron_llm.ops.batch import Batch
from tests.data.conversations import META as CHAT_META
from tests.data.conversations import WEIGHTS, Message, expect, number_tokens, write
from tests.data.sources import ASSISTANT, DOCUMENTS, make_config, write_chat, write_pretrain


def segments(batch: Batch) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(batch.cu_seqlens)]


def assert_well_formed(batch: Batch, rows: int, length: int) -> None:
    total = rows * length
    for tensor, dtype in (
        (batch.tokens_T, torch.int64),
        (batch.labels_T, torch.int64),
        (batch.weights_T, torch.float32),
        (batch.positions_T, torch.int64),
    ):
        assert tensor.shape == (total,)
        assert tensor.dtype == dtype
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == total
    assert all(a < b for a, b in itertools.pairwise(batch.cu_seqlens))
    assert set(range(0, total, length)) <= set(batch.cu_seqlens)
    expected = [position for part in segments(batch) for position in range(part.stop - part.start)]
    assert batch.positions_T.tolist() == expected


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_pretraining_windows(tmp_path: Path, order: str) -> None:
    total, length = sum(DOCUMENTS), 8
    starts = {sum(DOCUMENTS[:i]) for i in range(len(DOCUMENTS))}
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    stream = build_train_stream(make_config(length, train=[{"path": path}], order=order))
    assert stream.rows_per_epoch == (total - 1) // length == 12
    predicted_ever = set()
    firsts = []
    for epoch in range(8):
        rows = list(range(epoch * 12, epoch * 12 + 12))
        batch = stream.batch(rows)
        assert_well_formed(batch, 12, length)
        tokens, labels, weights = batch.tokens_T.tolist(), batch.labels_T.tolist(), batch.weights_T.tolist()
        assert labels == [(token + 1) % total for token in tokens]
        assert weights == [0.0 if label in starts else 1.0 for label in labels]
        assert batch.cu_seqlens[:-1] == tuple(i for i, token in enumerate(tokens) if token in starts or i % length == 0)
        assert len(set(labels)) == len(labels)  # nothing twice in one epoch
        predicted_ever |= set(labels)
        firsts.append(tuple(tokens[::length]))
        left_over = set(range(total)) - set(labels)
        assert len(left_over) == 2
    assert predicted_ever == set(range(total))  # nothing is left out for ever
    assert len(set(firsts)) == 8  # all epochs differ
    assert {min(first) % 8 for first in firsts} == set(range(8))
    in_file_order = firsts[0] == tuple(range(0, 96, 8))
    assert in_file_order == (order == "file")
    assert sorted(firsts[0]) == list(range(0, 96, 8))


def test_without_isolation_a_row_is_one_document(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    stream = build_train_stream(make_config(train=[{"path": path}], training={"document_isolation": False}))
    batch = stream.batch([0, 1, 2])
    assert_well_formed(batch, 3, 8)
    assert batch.cu_seqlens == (0, 8, 16, 24)
    assert batch.weights_T.tolist() == [1.0] * 24


def test_a_batch_is_its_rows_and_none_is_a_fill_row(tmp_path: Path) -> None:
    """The same row is the same wherever it stands, in a stream built again too."""
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    config = make_config(train=[{"path": path}])
    batch = build_train_stream(config).batch([40, None, 3])
    assert_well_formed(batch, 3, 8)
    for place, row in ((0, 40), (2, 3)):
        alone = build_train_stream(config).batch([row])
        part = slice(place * 8, place * 8 + 8)
        for name in ("tokens_T", "labels_T", "weights_T", "positions_T"):
            assert torch.equal(getattr(batch, name)[part], getattr(alone, name))
    assert batch.weights_T[8:16].tolist() == [0.0] * 8


def test_sources_are_blended_by_weight_and_keep_their_own_epochs(tmp_path: Path) -> None:
    a = write_pretrain(tmp_path / "a", [40])  # 4 rows
    b = write_pretrain(tmp_path / "b", [90], first=1000)  # 11 rows
    stream = build_train_stream(make_config(train=[{"path": a, "weight": 1}, {"path": b, "weight": 3}]))
    assert stream.rows_per_epoch == 4 + 11
    from_a = 0
    rows_of_a, rows_of_b = [], []
    for row in range(44):
        first = int(stream.batch([row]).tokens_T[0])
        (rows_of_b if first >= 1000 else rows_of_a).append(first)
        from_a += first < 1000
        assert abs(from_a - 0.25 * (row + 1)) < 1
    assert sorted(rows_of_a[:4]) == [0, 8, 16, 24]
    assert sorted(rows_of_b[:11]) == list(range(1000, 1088, 8))
    assert len(stream.summary) == 2
    assert "25.00%" in stream.summary[0]


CONVERSATIONS = [5, 16, 3, 9, 9, 9, 1, 12, 7, 7, 2, 16, 4]


@pytest.mark.parametrize("packing", ["auto", "best_fit", "in_order", "none"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_chat_rows(tmp_path: Path, packing: str, train_on: str) -> None:
    length = 16
    path, roles = write_chat(tmp_path / "a", CONVERSATIONS, first=1)  # id 0 fills rows
    starts = [1 + sum(CONVERSATIONS[:i]) for i in range(len(CONVERSATIONS))]
    config = make_config(length, kind="chat", train=[{"path": path}], packing=packing, train_on=train_on)
    assert check_data(config) == []
    stream = build_train_stream(config)
    for epoch in range(3):
        rows = range(epoch * stream.rows_per_epoch, (epoch + 1) * stream.rows_per_epoch)
        batch = stream.batch(list(rows))
        assert_well_formed(batch, len(rows), length)
        seen = []
        for part in segments(batch):
            tokens, weights = batch.tokens_T[part].tolist(), batch.weights_T[part].tolist()
            if tokens[0] == 0:  # what is left of the row
                assert part.stop % length == 0
                assert tokens == [0] * len(tokens)
                assert weights == [0.0] * len(tokens)
                continue
            count = CONVERSATIONS[starts.index(tokens[0])]
            assert tokens == list(range(tokens[0], tokens[0] + count))
            assert batch.labels_T[part].tolist()[:-1] == tokens[1:]
            bytes_ = [roles[token - 1] for token in tokens[1:]]
            wanted = [1.0 if byte == ASSISTANT or (train_on == "all" and not byte & NOT_TRAINED) else 0.0 for byte in bytes_]
            assert weights == [*wanted, 0.0]
            seen.append(tokens[0])
        assert sorted(seen) == [start for start, count in zip(starts, CONVERSATIONS, strict=True) if count > 1]
    assert "1 without a token to learn left out (1 tokens)" in stream.summary[0]
    if packing == "none":
        assert stream.rows_per_epoch == len(CONVERSATIONS) - 1


def test_chat_epochs_visit_rows_in_different_orders(tmp_path: Path) -> None:
    path, _ = write_chat(tmp_path / "a", [10] * 40, first=1)
    stream = build_train_stream(make_config(16, kind="chat", train=[{"path": path}]))
    orders = [stream.batch(list(range(epoch * 40, epoch * 40 + 40))).tokens_T[::16].tolist() for epoch in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) == list(range(1, 401, 10))
    assert orders[0] != orders[1] != orders[2]
    ordered = build_train_stream(make_config(16, kind="chat", train=[{"path": path}], order="file", packing="in_order"))
    assert ordered.batch(list(range(40))).tokens_T[::16].tolist() == list(range(1, 401, 10))


def test_overlong_conversations(tmp_path: Path) -> None:
    path, roles = write_chat(tmp_path / "a", [3, 20, 6, 17], first=1)

    def config(overlong: str) -> Config:
        return make_config(
            16, kind="chat", train=[{"path": path}], overlong=overlong, train_on="all", packing="none", order="file"
        )

    (problem,) = check_data(config("error"))
    assert "record 1 (counted from 0) has 20 tokens" in problem
    assert "2 of 4 records" in problem
    with pytest.raises(ValueError, match="record 1"):
        build_train_stream(config("error"))
    dropped = build_train_stream(config("drop"))
    assert dropped.rows_per_epoch == 2
    assert "2 longer than 16 tokens dropped" in dropped.summary[0]
    assert dropped.batch([0, 1]).tokens_T[::16].tolist() == [1, 24]
    cut = build_train_stream(config("truncate"))
    assert cut.rows_per_epoch == 4
    assert "2 longer than 16 tokens cut" in cut.summary[0]
    batch = cut.batch([1])
    assert batch.tokens_T.tolist() == list(range(4, 20))
    assert batch.weights_T.tolist() == [float(not byte & NOT_TRAINED) for byte in roles[4:19]] + [0.0]


def test_validation_is_in_file_order_ends_and_weighs_replies_only(tmp_path: Path) -> None:
    path, roles = write_chat(tmp_path / "a", [16, 16, 16])
    config = make_config(16, kind="chat", train=[{"path": path}], valid=[{"path": path, "name": "held out"}], train_on="all")
    (stream,) = build_valid_streams(config).values()
    assert list(build_valid_streams(config)) == ["held out"]
    assert stream.rows_per_epoch == 3
    weights = stream.batch([0, 1, 2]).weights_T
    assert weights.sum() == sum(roles[i] == ASSISTANT for i in range(48) if i % 16)
    with pytest.raises(ValueError, match="row 3 of a stream of 3"):
        stream.batch([3])

    pretrain = write_pretrain(tmp_path / "b", DOCUMENTS)
    (stream,) = build_valid_streams(make_config(train=[{"path": pretrain}], valid=[{"path": pretrain}])).values()
    assert stream.batch(list(range(stream.rows_per_epoch))).tokens_T.tolist() == list(range(96))


def synthetic(length: int = 32, vocab_size: int = 50, **training: Any) -> Config:
    return make_config(length, vocab_size, training, kind="synthetic")


def test_synthetic_rows() -> None:
    stream = build_train_stream(synthetic())
    batch = stream.batch(list(range(400)))
    assert_well_formed(batch, 400, 32)
    documents = Counter(start // 32 for start in batch.cu_seqlens[:-1])
    assert set(documents.values()) == {1, 2, 3, 4}
    tokens, labels, weights = batch.tokens_T.tolist(), batch.labels_T.tolist(), batch.weights_T.tolist()
    for part in segments(batch):
        assert labels[part][:-1] == tokens[part][1:]
        assert weights[part.stop - 1] == 0
    inner = [weights[i] for part in segments(batch) for i in range(part.start, part.stop - 1)]
    assert 0.73 < sum(inner) / len(inner) < 0.77
    assert len({sum(weights[i : i + 32]) for i in range(0, len(weights), 32)}) > 5
    counts = np.bincount(tokens, minlength=50)
    assert len(counts) == 50
    assert ((counts - 256) ** 2 / 256).sum() < 110  # chi-square, 49 degrees of freedom, beyond the 0.99999 quantile
    assert torch.equal(stream.batch([399]).tokens_T, batch.tokens_T[-32:])


def test_synthetic_rows_depend_on_seed_and_validation_differs() -> None:
    config = synthetic(eval_rows=7)
    valid = build_valid_streams(config)
    assert list(valid) == ["synthetic"]
    assert valid["synthetic"].rows_per_epoch == 7
    streams = [build_train_stream(config), build_train_stream(synthetic(seed=6)), valid["synthetic"]]
    assert len({tuple(stream.batch([0]).tokens_T.tolist()) for stream in streams}) == 3
    assert check_data(config) == []


def test_synthetic_rows_without_isolation() -> None:
    isolated, joined = build_train_stream(synthetic()), build_train_stream(synthetic(document_isolation=False))
    assert joined.batch([0, 1]).cu_seqlens == (0, 32, 64)
    assert torch.equal(joined.batch([0, 1]).tokens_T, isolated.batch([0, 1]).tokens_T)


def test_stream_of_one_token_documents(tmp_path: Path) -> None:
    """Every prediction crosses a boundary, so nothing is trained, and every token is its own segment."""
    stream: TokenStream = build_train_stream(make_config(4, train=[{"path": write_pretrain(tmp_path / "a", [1] * 9)}]))
    batch = stream.batch([0, 5])
    assert batch.cu_seqlens == tuple(range(9))
    assert batch.weights_T.sum() == 0


def test_boundary_loss_is_chosen_apart_from_isolation(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    starts = {sum(DOCUMENTS[:i]) for i in range(len(DOCUMENTS))}
    for isolation, setting, masked in (
        (True, "auto", True),
        (False, "auto", False),
        (True, "trained", False),
        (False, "masked", True),
    ):
        config = make_config(train=[{"path": path}], boundary_loss=setting, training={"document_isolation": isolation})
        assert check_data(config) == []
        batch = build_train_stream(config).batch(list(range(12)))
        assert batch.weights_T.tolist() == [0.0 if masked and label in starts else 1.0 for label in batch.labels_T.tolist()]
        assert (len(batch.cu_seqlens) > 13) == isolation


def test_best_fit_documents_in_a_stream(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS, first=1)
    config = make_config(train=[{"path": path}], valid=[{"path": path, "name": "v"}], packing="best_fit", training={"steps": 7})
    assert check_data(config) == []
    stream = build_train_stream(config)
    batch = stream.batch(list(range(stream.rows_per_epoch)))
    assert_well_formed(batch, stream.rows_per_epoch, 8)
    assert sorted(filter(None, batch.tokens_T.tolist())) == list(range(1, sum(DOCUMENTS) + 1))
    assert batch.weights_T.sum() == sum(DOCUMENTS) - len(DOCUMENTS)
    (valid,) = build_valid_streams(config).values()
    assert sorted(filter(None, valid.batch(list(range(valid.rows_per_epoch))).tokens_T.tolist())) == list(range(1, 99))


def test_a_mixture_of_chat_and_documents_of_several_dtypes(tmp_path: Path) -> None:
    """Each source as it is alone, in one stream, whatever its dtype and kind."""
    text = write_pretrain(tmp_path / "text", [50, 31], dtype=np.uint16)
    more = write_pretrain(tmp_path / "more", [40], first=70_000, dtype=np.int32)
    chat, roles = write_chat(tmp_path / "chat", [8, 3, 5, 2], first=1000)
    train = [{"path": text}, {"path": chat, "kind": "chat"}, {"path": more, "weight": 2}]
    for packing in ("auto", "concat", "best_fit", "in_order"):
        config = make_config(train=train, packing=packing, valid=[{"path": chat, "kind": "chat"}])
        assert check_data(config) == []
        stream = build_train_stream(config)
        batch = stream.batch(list(range(36)))  # 9 rows of the conversations: 3 epochs
        assert_well_formed(batch, 36, 8)
        of_source = np.digitize(batch.tokens_T[::8].numpy(), [1000, 70_000])
        assert np.bincount(of_source).tolist() == [9, 9, 18]
        chat_tokens = batch.tokens_T.view(36, 8)[of_source == 1].flatten()
        chat_weights = batch.weights_T.view(36, 8)[of_source == 1].flatten()
        assert set(chat_tokens.tolist()) == {0, *range(1000, 1018)}
        first = {0, 8, 11, 16, 18}
        predicted = sum(roles[i] == ASSISTANT for i in range(18) if i not in first)
        assert chat_weights.sum() == 3 * predicted
        (valid,) = build_valid_streams(config).values()
        assert valid.batch(list(range(valid.rows_per_epoch))).weights_T.sum() == predicted
    (problem,) = check_data(make_config(train=train[::2], packing="none"))
    assert "data.packing: none does not go with data.kind pretrain" in problem


def test_epochs_are_shares_of_rows(tmp_path: Path) -> None:
    a = write_pretrain(tmp_path / "a", [8 * 30 + 1])  # 30 rows
    b = write_pretrain(tmp_path / "b", [8 * 100 + 1], first=1000)
    sources = [{"path": a, "epochs": 2}, {"path": b, "epochs": 0.4}]
    config = make_config(train=sources, training={"steps": -1, "global_batch_size": 4})
    assert check_data(config) == []
    assert steps_of_epochs(config) == 100 // 4
    config = make_config(train=sources, training={"steps": 25, "global_batch_size": 4})
    stream = build_train_stream(config)
    firsts = Counter(stream.batch(list(range(100))).tokens_T[::8].tolist())
    from_a = [first for first in firsts.elements() if first < 1000]
    assert abs(len(from_a) - 60) <= 1
    assert sum(first >= 1000 for first in firsts) == 100 - len(from_a), "no row of b twice"
    assert "60.00% of the rows; this run reads 480 tokens of it, 2 epochs" in stream.summary[0]
    assert "this run reads 320 tokens of it, 0.4 epochs" in stream.summary[1]


def test_a_mixture_of_two_sft_sets_and_text_in_epochs(tmp_path: Path) -> None:
    """With steps -1 every source is read exactly as often as its epochs say, and weighs what it weighs alone."""
    talks = [
        [
            [Message("user", 2 + n % 5), Message("assistant", 1 + (n + k) % 4, weight=WEIGHTS[n % 3], before=1)]
            for n in range(40 + 17 * k)
        ]
        for k in (0, 1)
    ]
    sets = [write(tmp_path / f"chat{k}", talks[k], first=2 + 10_000 * k, meta=CHAT_META) for k in (0, 1)]
    text = write_pretrain(tmp_path / "text", [7, 30, 11, 16 * 20 + 1 - 48], first=50_000, meta=None)
    train = [
        {"path": sets[0], "kind": "chat", "epochs": 3},
        {"path": sets[1], "kind": "chat", "epochs": 2},
        {"path": text, "epochs": 0.35},
    ]
    settings = {"train": train, "prompt_loss_weight": 0.125, "train_on": "last_assistant"}
    config = make_config(16, **settings, training={"steps": -1, "global_batch_size": 1})
    assert check_data(config) == []
    steps = steps_of_epochs(config)
    config = make_config(16, **settings, training={"steps": steps, "global_batch_size": 1})
    stream = build_train_stream(config)
    read: dict[int, Counter[Any]] = {0: Counter(), 1: Counter(), 5: Counter()}
    rows: Counter[int] = Counter()
    for number in range(steps):
        batch = stream.batch([number])
        source = int(batch.tokens_T[0]) // 10_000
        rows[source] += 1
        for part in segments(batch):
            if batch.tokens_T[part][0]:
                ids, weights = tuple(batch.tokens_T[part].tolist()), tuple(batch.weights_T[part].tolist())
                read[source][ids, weights[:-1] if source < 5 else weights] += 1
    for k, epochs in ((0, 3), (1, 2)):
        expected = expect(talks[k], 16, "last_assistant", 0.125, "drop", number_tokens(talks[k], 2 + 10_000 * k))
        assert read[k] == {piece: epochs for piece in expected.pieces}
    assert rows[5] == 7, "0.35 of 20 rows"
    assert all(weight == 1 for _, weights in read[5] for weight in weights[:-1]), "text has loss whatever train_on is"
    assert steps == sum(rows.values())


def test_a_mixture_by_weight_after_any_number_of_rows(tmp_path: Path) -> None:
    paths = [write_chat(tmp_path / f"chat{k}", [10] * 9, first=1000 * k)[0] for k in (1, 2)]
    text = write_pretrain(tmp_path / "text", [16 * 10 + 1], first=3000)
    train = [{"path": path, "kind": "chat", "weight": weight} for path, weight in zip(paths, (0.5, 0.3), strict=True)]
    stream = build_train_stream(make_config(16, train=[*train, {"path": text, "weight": 0.2}]))
    taken = np.zeros(3)
    for number in range(200):
        taken[int(stream.batch([number]).tokens_T[0]) // 1000 - 1] += 1
        assert (abs(taken - np.array([0.5, 0.3, 0.2]) * (number + 1)) < 1).all()


def test_variants_of_training_only(tmp_path: Path) -> None:
    talks = [[Message("user", 3), Message("assistant", 4, before=1)] for _ in range(50)]
    path = write(tmp_path / "chat", talks)
    write(tmp_path / "chat.flip", [[] if n % 2 else talk for n, talk in enumerate(talks)], first=10_000)

    def config(**augment: Any) -> Config:
        source = [{"path": path}]
        return make_config(8, kind="chat", train=source, valid=source, packing="none", order="file", conversation_augment=augment)

    assert check_data(config(flip=1.0)) == []
    stream = build_train_stream(config(flip=1.0))
    assert stream.rows_per_epoch == 50
    for number in (0, 1, 50, 149):
        assert (int(stream.batch([number]).tokens_T[0]) >= 10_000) == (number % 2 == 0), "the same in every epoch"
    assert "25 replaced by flip (25 chosen have none)" in stream.summary[0]
    (valid,) = build_valid_streams(config(flip=1.0)).values()
    assert valid.batch(list(range(50))).tokens_T.max() < 10_000
    by_seed = [build_train_stream(config(flip=0.5, seed=seed)).batch(list(range(50))).tokens_T.tolist() for seed in (1, 2, 1)]
    assert by_seed[0] == by_seed[2] != by_seed[1]
    assert by_seed[0] != build_train_stream(config(flip=0.5)).batch(list(range(50))).tokens_T.tolist()
    without, described = (describe_data(config(**rates))["data"]["train"][0] for rates in ({}, {"flip": 0.5}))
    assert described.pop("variants")["flip"]["tokens"] == 25 * 8
    assert described == without


def test_short_to_long_of_every_source_by_itself(tmp_path: Path) -> None:
    lengths = [[9, 2, 15, 4, 7, 4, 12], [3, 11, 6, 14, 5, 5, 8]]
    paths = [write_chat(tmp_path / f"chat{k}", lengths[k], first=1000 * (k + 1))[0] for k in (0, 1)]
    config = make_config(16, kind="chat", train=[{"path": path} for path in paths], order="short_to_long")
    assert check_data(config) == []
    stream = build_train_stream(config)
    found: dict[int, list[int]] = {1: [], 2: []}
    for number in range(2 * max(source.rows_per_epoch for source in stream._sources)):
        batch = stream.batch([number])
        parts = [part for part in segments(batch) if batch.tokens_T[part][0]]
        found[int(batch.tokens_T[0]) // 1000] += [part.stop - part.start for part in parts]
    for k in (0, 1):
        assert found[k + 1][: len(lengths[k])] == sorted(lengths[k])


def test_megatron_order_of_one_source(tmp_path: Path) -> None:
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    valid = [{"path": path, "name": "v"}]
    training = {"steps": 15, "global_batch_size": 3}
    for split, isolation, loss, masked in (
        ("1,0,0", True, "auto", True),
        ("8,1,1", False, "auto", False),
        ("1,0,0", False, "masked", True),
        ("1,0,0", True, "trained", False),
    ):
        config = make_config(
            train=[{"path": path}],
            valid=valid,
            order="megatron",
            megatron_split=split,
            boundary_loss=loss,
            training={**training, "document_isolation": isolation},
        )
        assert check_data(config) == []
        stream = build_train_stream(config)
        expected = MegatronRows(IndexedDataset(path), 8, 5, 45, split, isolation, masked)
        for number in range(45):
            row, batch = expected.row(number), stream.batch([number])
            assert batch.tokens_T.tolist() == row.tokens.tolist()
            assert batch.labels_T.tolist() == row.labels.tolist()
            assert batch.weights_T.tolist() == row.weights.tolist()
            assert batch.cu_seqlens[:-1] == tuple(row.starts.tolist())
        (held_out,) = build_valid_streams(config).values()
        assert held_out.batch(list(range(12))).tokens_T.tolist() == list(range(96)), "validation stays in file order"


def test_megatron_order_of_a_blend(tmp_path: Path) -> None:
    paths = [write_pretrain(tmp_path / "a", DOCUMENTS), write_pretrain(tmp_path / "b", DOCUMENTS * 2, first=1000)]
    weights = [0.3, 0.7]
    train = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    config = make_config(train=train, order="megatron", training={"steps": 30})
    assert check_data(config) == []
    stream = build_train_stream(config)
    samples = source_samples(weights, 60)
    rows = [MegatronRows(IndexedDataset(path), 8, 5, n, "1,0,0", True, True) for path, n in zip(paths, samples, strict=True)]
    blend = MegatronBlend(weights, 60)
    for number in range(60):
        source, within = blend(number)
        assert stream.batch([number]).tokens_T.tolist() == rows[source].row(within).tokens.tolist()
    with pytest.raises(ValueError, match="60"):
        stream.batch([60])


def test_megatron_order_of_one_source_with_a_weight_is_a_blend(tmp_path: Path) -> None:
    """Megatron takes its margin of samples then, which can change the number of epochs and with it the order."""
    path = write_pretrain(tmp_path / "a", DOCUMENTS)
    stream = build_train_stream(make_config(train=[{"path": path, "weight": 2}], order="megatron", training={"steps": 100}))
    rows = MegatronRows(IndexedDataset(path), 8, 5, 201, "1,0,0", True, True)
    assert source_samples([2], 200) == [201]
    for number in range(200):
        assert stream.batch([number]).tokens_T.tolist() == rows.row(number).tokens.tolist()
