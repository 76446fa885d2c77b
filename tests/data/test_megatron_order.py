"""Megatron's row order against megatron-core itself: every row, every label, every turn of a blend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from megatron_llm.data import megatron_order
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.megatron_order import MegatronBlend, MegatronRows, greedy_blend, greedy_blend_reference, source_samples
from tests.data.test_indexed import write_by_hand

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core warns about everything that is not installed

GAP = 1000  # token i of sequence n is n * GAP + i, so every token tells where it comes from


class _Tokenizer:
    """What GPTDataset asks of a tokenizer. No id here is as large as these, so nothing is padding or an end."""

    vocab_size, eod, pad = 1 << 30, 1 << 29, 1 << 29
    unique_identifiers: dict[str, str] = {}


def megatron(prefixes: Sequence[Path], weights: Sequence[float] | None, samples: int, length: int, seed: int, split: str) -> Any:
    """The training set that Megatron's own builder makes."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class TrainingOnly(GPTDataset):
        """Megatron never ends on a validation or test split without tokens, which small files easily have."""

        def _build_document_sample_shuffle_indices(self) -> Any:
            if self.index_split == Split.train:
                return super()._build_document_sample_shuffle_indices()
            return np.empty(0), np.empty((1, 2)), np.empty(0)

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=length,
        blend=([str(prefix) for prefix in prefixes], None if weights is None else list(weights)),
        split=split,
        tokenizer=_Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(TrainingOnly, [samples, 0, 0], lambda: True, config).build()[0]


def write_sequences(prefix: Path, lengths: Sequence[int], first: int = 0) -> Path:
    """Sequences whose tokens tell where they come from, numbered from `first`; two sequences a document."""
    sequences = [[(first + number) * GAP + i for i in range(length)] for number, length in enumerate(lengths)]
    write_by_hand(prefix, sequences, [*range(0, len(lengths), 2), len(lengths)])
    return prefix


def assert_same_rows(prefix: Path, samples: int, length: int, seed: int, split: str) -> MegatronRows:
    expected = megatron([prefix], None, samples, length, seed, split)
    rows = MegatronRows(IndexedDataset(prefix), length, seed, samples, split, isolation=False, masked=False)
    assert rows.samples == len(expected)
    for number in range(rows.samples):
        row, sample = rows.row(number), expected[number]
        assert row.tokens.tolist() == sample["tokens"].tolist()
        assert row.labels.tolist() == sample["labels"].tolist()
        assert row.weights.tolist() == sample["loss_mask"].tolist()
        assert row.starts.tolist() == [0]
    return rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(lambda lengths: sum(lengths[: len(lengths) // 2]) > 1),
    length=st.integers(2, 40),
    samples=st.integers(1, 200),
    seed=st.integers(0, 2**31 - 1),
    split=st.sampled_from(["1,0,0", "1", "969,30,1", "90,10", "0.5,0.3,0.2", "1,1,0"]),
)
@example(lengths=[3, 2], length=40, samples=3, seed=1, split="1,0,0")  # an epoch is less than a row
@example(lengths=[8, 8, 1], length=4, samples=4, seed=1, split="1,0,0")  # the last row ends with the epoch
def test_rows_of_one_source(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, samples: int, seed: int, split: str
) -> None:
    assert_same_rows(write_sequences(tmp_path_factory.mktemp("m") / "a", lengths), samples, length, seed, split)


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize(("used", "apart"), [(6, True), (7, True), (8, False), (9, False)])
def test_the_last_epoch_is_apart_if_less_than_four_fifths_is_used(tmp_path: Path, epochs: int, used: int, apart: bool) -> None:
    """An epoch of 10 rows of 4 tokens, of which the last gives 6 to 9."""
    prefix = write_sequences(tmp_path / "a", [7, 0, 20, 13, 1])
    before = ((epochs - 1) * 41 - 1) // 4
    rows = assert_same_rows(prefix, before + used, 4, 1234, "1,0,0")
    assert rows.epochs == epochs
    assert rows.rows_per_epoch == 10
    assert ("apart" in rows.summary) == (apart and epochs > 1)


def test_sequences_beyond_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_order, "BLOCK", 7)
    lengths = np.random.default_rng(0).integers(0, 12, 100).tolist()
    assert_same_rows(write_sequences(tmp_path / "a", [0, 0, 0, 0, 0, 0, 0, 0, 90, *lengths]), 300, 11, 5, "95,5,0")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) > 0),
    length=st.integers(1, 30),
    samples=st.integers(1, 50),
)
def test_isolation(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, samples: int) -> None:
    """A segment is a run of consecutive tokens of one sequence, and no token predicts the next segment's first one."""
    prefix = write_sequences(tmp_path_factory.mktemp("m") / "a", lengths)
    rows = MegatronRows(IndexedDataset(prefix), length, 7, samples, "1,0,0", isolation=True, masked=True)
    for number in range(rows.samples):
        row = rows.row(number)
        window = np.append(row.tokens, row.labels[-1])
        goes_on = np.diff(window) == 1
        assert row.starts.tolist() == [0, *(1 + np.flatnonzero(~goes_on[:-1])).tolist()]
        assert row.weights.tolist() == goes_on.tolist()
        assert row.labels[:-1].tolist() == row.tokens[1:].tolist()


WEIGHTS = st.lists(st.one_of(st.integers(1, 5).map(float), st.floats(1e-3, 1e3)), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), weights=WEIGHTS, size=st.integers(1, 400), length=st.integers(2, 20), seed=st.integers(0, 2**31 - 1))
def test_blends(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, weights: list[float], size: int, length: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("m")
    prefixes = []
    for number in range(len(weights)):
        lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=9))
        prefixes.append(write_sequences(folder / str(number), lengths, first=100 * number))
    try:
        expected = megatron(prefixes, weights, size, length, seed, "1,0,0")
    except IndexError as error:  # it deals up to a row more per source than asked for, too many for its own sources
        assert "oversamples" in str(error)
        reject()
    blend, asked = MegatronBlend(weights, size), source_samples(weights, size)
    sources = [
        MegatronRows(IndexedDataset(prefix), length, seed, samples, "1,0,0", isolation=False, masked=False)
        for prefix, samples in zip(prefixes, asked, strict=True)
    ]
    assert [source.samples for source in sources] == [len(dataset) for dataset in expected.datasets]
    taken = [0] * len(weights)
    for number in range(size):
        source, within = blend(number)
        assert (source, within) == (expected.dataset_index[number], expected.dataset_sample_index[number])
        assert sources[source].row(within).tokens.tolist() == expected[number]["tokens"].tolist()
        taken[source] += 1
    assert blend.counts == taken
    assert blend.period == size


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.2, 0.3, 1.0, 1.0 / 3, 3.0]), min_size=1, max_size=12), size=st.integers(1, 12000))
@example(weights=[1.0] * 7, size=3 * 4096)
def test_long_blends_with_ties(weights: list[float], size: int) -> None:
    """Against Megatron's C++ function on the weights that its two classes hand on."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

    sources, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(sources, numbers, normalize(normalize(weights)), len(weights), size, False)
    blend = MegatronBlend(weights, size)
    rows = sorted({0, size - 1, *range(0, size, 97), *(row for row in (4095, 4096, 4097, 8192) if row < size)})
    assert [blend(row) for row in rows] == [(sources[row], numbers[row]) for row in rows]
    assert (
        greedy_blend_reference(np.asarray(normalize(weights)), size).tolist() == greedy_blend(normalize(weights), size).tolist()
    )


def test_rows_end_where_the_order_ends(tmp_path: Path) -> None:
    rows = MegatronRows(
        IndexedDataset(write_sequences(tmp_path / "a", [30, 30])), 8, 1, 5, "1,0,0", isolation=False, masked=False
    )
    assert rows.samples == 7  # what one epoch holds
    for number in (-1, 7):
        with pytest.raises(ValueError, match=rf"row {number} of .*made for 7 rows"):
            rows.row(number)
    blend = MegatronBlend([1, 1], 10)
    for number in (-1, 10):
        with pytest.raises(ValueError, match=rf"row {number} of a blend .* made for 10 rows"):
            blend(number)


@pytest.mark.parametrize("split", ["", "a", "1,,0", "-1,2", "0,0,0", "1,1,1,1", "nan", "inf,1", "969:30:1"])
def test_a_malformed_split_is_refused(tmp_path: Path, split: str) -> None:
    dataset = IndexedDataset(write_sequences(tmp_path / "a", [30, 30]))
    with pytest.raises(ValueError, match=r"data\.megatron_split: .* such as 969,30,1"):
        MegatronRows(dataset, 8, 1, 5, split, isolation=False, masked=False)


@pytest.mark.parametrize(("split", "sequences"), [("0,1", 0), ("1,9", 0), ("1,2", 1)])
def test_a_training_split_without_tokens_is_refused(tmp_path: Path, split: str, sequences: int) -> None:
    dataset = IndexedDataset(write_sequences(tmp_path / "a", [0, 9, 9, 9]))
    with pytest.raises(ValueError, match=rf"the first {sequences} of 4 sequences, which have no tokens"):
        MegatronRows(dataset, 8, 1, 5, split, isolation=False, masked=False)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    prefix = write_sequences(tmp_path / "a", [9, 9, 9])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34 + 12 + 8 : 34 + 12 + 16] = (40).to_bytes(8, "little")  # sequence 1 starts at byte 40 instead of 36
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.idx: sequence 1 \(byte 54\)"):
        MegatronRows(IndexedDataset(prefix), 8, 1, 2, "1,0,0", isolation=False, masked=False).row(0)


def test_too_many_sources() -> None:
    with pytest.raises(ValueError, match="32767 sources"):
        MegatronBlend([1.0] * 32767, 1)
