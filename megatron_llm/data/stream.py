"""`TokenStream`: micro-batches by row number, from the data sets that a config names.

`training/loop.py` makes one stream for training and one per validation set; `training/step.py` asks each rank's stream
for the rows of its micro-batches. A stream is an endless pure function of row numbers, so the data-parallel size may
change between two starts and nobody broadcasts batches. `training/resolve.py` calls `check_data` before any process group exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_llm.config import Config, SourceConfig
from megatron_llm.data.blend import Blend
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.order import hash64
from megatron_llm.data.packing import Method
from megatron_llm.data.rows import ChatRows, PretrainRows, Row, RowSource, SyntheticRows
from megatron_llm.ops.batch import Batch

PACKINGS: dict[str, dict[str, Method | None]] = {  # kind -> what data.packing may say -> how conversations are packed
    "pretrain": {"auto": None, "concat": None},
    "chat": {"auto": "best_fit", "best_fit": "best_fit", "in_order": "in_order", "none": "none"},
}
SYNTHETIC_ROWS = 1 << 40  # rows before the training stream of random tokens would repeat
VALIDATION_SEED = 1 << 32  # added to the seed, which is below 2^31


class TokenStream:
    """Rows of one or several sources, blended by weight.

    Attributes:
        rows_per_epoch: rows of all sources together, each counted once. A validation stream has no others.
        summary: a sentence per source, for the log.
    """

    def __init__(self, sources: dict[str, RowSource], weights: Sequence[float], sequence_length: int, endless: bool = True):
        """`sources` by name. With `endless` row numbers may go beyond the first epoch."""
        self._sources, self._length, self._endless = list(sources.values()), sequence_length, endless
        self._blend = Blend(weights)
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self._sources)
        shares = [count / self._blend.period for count in self._blend.counts]
        self.summary = [
            f"{name}: {source.summary}" + (f", {share:.2%} of the rows" if len(shares) > 1 else "")
            for (name, source), share in zip(sources.items(), shares, strict=True)
        ]

    def batch(self, rows: Sequence[int | None]) -> Batch:
        """One micro-batch of len(rows) * sequence_length tokens on the CPU. Every row starts a new segment.

        None is a fill row of weight 0. Raises ValueError for a row beyond the end of a validation stream.
        """
        parts = [self._fill_row() if row is None else self._row(row) for row in rows]
        total = len(parts) * self._length
        starts = np.concatenate([part.starts + number * self._length for number, part in enumerate(parts)])
        cu_seqlens = np.append(starts, total)
        positions = np.arange(total) - np.repeat(starts, np.diff(cu_seqlens))
        return Batch(
            tokens_T=torch.from_numpy(np.concatenate([part.tokens for part in parts])),
            labels_T=torch.from_numpy(np.concatenate([part.labels for part in parts])),
            weights_T=torch.from_numpy(np.concatenate([part.weights for part in parts])),
            positions_T=torch.from_numpy(positions),
            cu_seqlens=tuple(cu_seqlens.tolist()),
        )

    def _row(self, number: int) -> Row:
        if number < 0 or (not self._endless and number >= self.rows_per_epoch):
            raise ValueError(f"row {number} of a stream of {self.rows_per_epoch} rows")
        source, within = self._blend(number)
        return self._sources[source].row(within)

    def _fill_row(self) -> Row:
        zeros = np.zeros(self._length, np.int64)
        return Row(zeros, zeros, np.zeros(self._length, np.float32), zeros[:1])


def build_train_stream(config: Config) -> TokenStream:
    """The endless training stream. Raises ValueError for what `check_data` would have reported."""
    data, length, seed = config.data, config.training.sequence_length, config.training.seed
    if data.kind == "synthetic":
        isolation = config.training.document_isolation
        rows = SyntheticRows(config.model.vocab_size, length, seed, isolation, SYNTHETIC_ROWS)
        return TokenStream({"synthetic": rows}, [1.0], length)
    sources = {
        f"{index}. {_name(source)}" if len(data.train) > 1 else _name(source): _rows(
            config, IndexedDataset(source.path), hash64(seed, index), train=True
        )
        for index, source in enumerate(data.train)
    }
    if not sources:
        raise ValueError("data.train lists no data set")
    return TokenStream(sources, [source.weight for source in data.train], length)


def build_valid_streams(config: Config) -> dict[str, TokenStream]:
    """A stream of `rows_per_epoch` rows in file order for every validation set, by name.

    Chat sets weigh the assistant's tokens only, whatever training does. With `kind: synthetic` there is one set,
    `training.eval_rows` rows of random tokens that training never sees.
    """
    length, seed = config.training.sequence_length, config.training.seed
    if config.data.kind == "synthetic":
        isolation = config.training.document_isolation
        rows = SyntheticRows(config.model.vocab_size, length, seed + VALIDATION_SEED, isolation, config.training.eval_rows)
        return {"synthetic": TokenStream({"synthetic": rows}, [1.0], length, endless=False)}
    return {
        _name(source): TokenStream(
            {_name(source): _rows(config, IndexedDataset(source.path), seed, train=False)}, [1.0], length, endless=False
        )
        for source in config.data.valid
    }


def check_data(config: Config) -> list[str]:
    """Every problem with the data, one sentence each; none means the streams can be built. Raises nothing, reads little:
    headers, chat lengths, and all tokens only where no meta file knows the largest id."""
    data = config.data
    if data.kind == "synthetic":
        return []
    problems = []
    if data.packing not in PACKINGS[data.kind]:
        allowed = ", ".join(PACKINGS[data.kind])
        problems.append(f"data.packing: {data.packing} does not go with data.kind {data.kind}; use one of: {allowed}")
    if data.kind == "chat" and not config.training.document_isolation:
        problems.append(
            "training.document_isolation: false does not go with data.kind chat, "
            "where the conversations of a row never see each other; remove it"
        )
    if not data.train:
        problems.append("data.train: lists no data set; give at least one {path: PREFIX}, or set data.kind: synthetic")
    for name, count in Counter(_name(source) for source in data.valid).items():
        if count > 1:
            problems.append(f"data.valid: {count} sets are called {name!r}; give each its own name")
    for where, source, train in _all_sources(config):
        problems += [f"{where}: {problem}" for problem in _source_problems(config, source, train)]
    return problems


def _all_sources(config: Config) -> Iterator[tuple[str, SourceConfig, bool]]:
    for index, source in enumerate(config.data.train):
        yield f"data.train.{index}.path", source, True
    for index, source in enumerate(config.data.valid):
        yield f"data.valid.{index}.path", source, False


def _source_problems(config: Config, source: SourceConfig, train: bool) -> list[str]:
    try:
        dataset = IndexedDataset(source.path)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    try:
        largest = dataset.max_token_id()
        if largest >= config.model.vocab_size:
            known = f" (tokenizer {dataset.meta.tokenizer}, {dataset.meta.vocab_size} tokens)" if dataset.meta else ""
            problems.append(
                f"{source.path}.bin has token id {largest}{known}, but model.vocab_size is {config.model.vocab_size}; "
                f"preprocess with the model's tokenizer or set model.vocab_size to at least {largest + 1}"
            )
    except ValueError as error:
        problems.append(str(error))
    if config.data.packing in PACKINGS[config.data.kind]:
        try:
            _rows(config, dataset, 0, train)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _rows(config: Config, dataset: IndexedDataset, seed: int, train: bool) -> RowSource:
    """Rows of one data set as `data.*` wants them. Raises ValueError if the data set cannot give them."""
    data, length = config.data, config.training.sequence_length
    shuffled = train and data.order == "shuffled"
    method = PACKINGS[data.kind][data.packing]
    if method is None:
        return PretrainRows(dataset, length, seed, shuffled, config.training.document_isolation)
    return ChatRows(dataset, length, seed, shuffled, method, data.train_on if train else "assistant", data.overlong)


def _name(source: SourceConfig) -> str:
    return source.name or Path(source.path).name
