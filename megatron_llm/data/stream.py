"""`TokenStream`: micro-batches by row number, from the data sets that a config names.

`training/loop.py` makes one stream for training and one per validation set; `training/step.py` asks each rank's stream
for the rows of its micro-batches. A stream is an endless pure function of row numbers, so the data-parallel size may
change between two starts and nobody broadcasts batches. `training/resolve.py` calls `check_data` before any process group exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from megatron_llm.config import Config, SourceConfig
from megatron_llm.data.blend import RESOLUTION, Blend, round_weights
from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
from megatron_llm.data.megatron_order import MegatronBlend, MegatronRows, source_samples
from megatron_llm.data.order import hash64
from megatron_llm.data.packing import Method
from megatron_llm.data.rows import PretrainRows, Row, RowSource, SyntheticRows, chat_rows, document_rows
from megatron_llm.ops.batch import Batch

PRETRAIN_PACKINGS = {"auto": "concat", "concat": "concat", "best_fit": "best_fit"}  # what data.packing may say -> what is done
CHAT_PACKINGS: dict[str, Method] = {"auto": "best_fit", "best_fit": "best_fit", "in_order": "in_order", "none": "none"}
PACKINGS = {"pretrain": PRETRAIN_PACKINGS.keys(), "chat": CHAT_PACKINGS.keys()}
SYNTHETIC_ROWS = 1 << 40  # rows before the training stream of random tokens would repeat
VALIDATION_SEED = 1 << 32  # added to the seed, which is below 2^31
LARGEST_ROUNDING = 0.1  # a source's share of the rows may differ from what was asked for by this part of it


class TokenStream:
    """Rows of one or several sources, blended.

    Attributes:
        rows_per_epoch: rows of all sources together, each counted once. A validation stream has no others.
        summary: a sentence per source, for the log.
    """

    def __init__(
        self,
        sources: dict[str, RowSource],
        blend: Blend | MegatronBlend,
        sequence_length: int,
        endless: bool = True,
        planned_rows: int = 0,
    ):
        """`sources` by name. With `endless` row numbers may go beyond the first epoch. `planned_rows`: of the whole run."""
        self._sources, self._length, self._endless = list(sources.values()), sequence_length, endless
        self._blend, self._nobody = blend, np.zeros(sequence_length, np.uint8)
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self._sources)
        self.summary = [
            f"{name}: {source.summary}" + self._plan(source, count / blend.period, planned_rows)
            for (name, source), count in zip(sources.items(), blend.counts, strict=True)
        ]

    def _plan(self, source: RowSource, share: float, planned_rows: int) -> str:
        """What the run will read of a source."""
        text = f", {share:.2%} of the rows" if len(self._sources) > 1 else ""
        if planned_rows:
            rows = round(share * planned_rows)
            text += f"; this run reads {rows * self._length:,} tokens of it, {rows / source.rows_per_epoch:.4g} epochs"
        return text

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
            roles_T=torch.from_numpy(np.concatenate([self._nobody if part.roles is None else part.roles for part in parts])),
            rows=tuple(-1 if row is None else row for row in rows),
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
    """The training stream of a config with `training.steps` known; endless, but for `data.order: megatron`.

    Raises ValueError for what `check_data` would have reported.
    """
    data, length, seed = config.data, config.training.sequence_length, config.training.seed
    if data.kind == "synthetic":
        isolation = config.training.document_isolation
        rows = SyntheticRows(config.model.vocab_size, length, seed, isolation, SYNTHETIC_ROWS)
        return TokenStream({"synthetic": rows}, Blend([1.0]), length)
    if not data.train:
        raise ValueError("data.train lists no data set")
    assert config.training.steps >= 0, "training.steps: -1 is resolved before anything else"
    sources = {}
    for index, source in enumerate(data.train):
        dataset = _open(config, source)
        sources[f"{index}. {_name(source)}" if len(data.train) > 1 else _name(source)] = _train_rows(config, index, dataset)
        if data.order != "file":
            dataset.expect_random_reads()
    weights = _weights(config, list(sources.values()))
    planned = _planned_rows(config)
    blend: Blend | MegatronBlend = MegatronBlend(weights, planned) if _blends_as_megatron(config) else Blend(weights)
    return TokenStream(sources, blend, length, planned_rows=planned)


def describe_data(config: Config) -> dict[str, Any]:
    """What is in the training data, to notice when it is not the same any more; reads few tokens. Empty for random ones.

    Raises ValueError for what `check_data` would have reported.
    """
    if config.data.kind == "synthetic":
        return {}
    described = []
    for source in config.data.train:
        dataset = _open(config, source)
        tokenizer = dataset.meta.tokenizer_fingerprint if dataset.meta else None
        counts = {"documents": dataset.documents, "tokens": len(dataset.tokens)}
        described.append({**counts, "tokenizer_fingerprint": tokenizer, "sample": _sample(dataset)})
    return {"data": {"train": described}}


def _sample(dataset: IndexedDataset) -> str:
    """A checksum of tokens, roles and lengths at 64 places all over a data set."""
    digest = xxhash.xxh3_64()
    for column in (dataset.tokens, dataset.roles, dataset.sequence_lengths):
        count = 0 if column is None else len(column)
        for place in range(64 if count else 0):
            start = (count - 1) * place // 63
            digest.update(np.asarray(column[start : start + 256]).astype(np.int64).tobytes())  # type: ignore[index]
    return digest.hexdigest()


def build_valid_streams(config: Config) -> dict[str, TokenStream]:
    """A stream of `rows_per_epoch` rows in file order for every validation set, by name.

    Chat sets weigh the assistant's tokens only, whatever training does. With `kind: synthetic` there is one set,
    `training.eval_rows` rows of random tokens that training never sees.
    """
    length, seed = config.training.sequence_length, config.training.seed
    if config.data.kind == "synthetic":
        isolation = config.training.document_isolation
        rows = SyntheticRows(config.model.vocab_size, length, seed + VALIDATION_SEED, isolation, config.training.eval_rows)
        return {"synthetic": TokenStream({"synthetic": rows}, Blend([1.0]), length, endless=False)}
    return {
        _name(source): TokenStream(
            {_name(source): _valid_rows(config, source, _open(config, source))}, Blend([1.0]), length, endless=False
        )
        for source in config.data.valid
    }


def steps_of_epochs(config: Config) -> int:
    """Steps in which each source of `data.train` is read as often as its `epochs` say, rounded down to whole steps."""
    rows = Fraction(0)
    for index, source in enumerate(config.data.train):
        assert source.epochs is not None
        # As written: 0.29 epochs of 100 rows are 29 rows, though 0.29 * 100 is 28.999999999999996.
        rows += Fraction(str(source.epochs)) * _train_rows(config, index, _open(config, source)).rows_per_epoch
    return config.training.steps_within(int(rows))


def check_data(config: Config) -> list[str]:
    """Every problem with the data, one sentence each; none means the streams can be built. Raises nothing, reads little:
    headers, the index of data that is packed, and all tokens only where no meta file knows the largest id."""
    if config.data.kind == "synthetic":
        return []
    problems = _setting_problems(config)
    sources: list[RowSource] = []
    metas: dict[str, DatasetMeta] = {}
    for where, source, index in _all_sources(config):
        try:
            dataset = _open(config, source)
            if dataset.meta is not None:
                metas[where] = dataset.meta
            problem = _vocabulary_problem(config, dataset)
            problems += [f"{where}: {problem}"] if problem else []
            if index is None:
                _valid_rows(config, source, dataset)
            else:
                sources.append(_train_rows(config, index, dataset))
        except (ValueError, OSError) as error:
            problems.append(f"{where}: {error}")
    problems += _tokenizer_problems(metas)
    if sources and len(sources) == len(config.data.train):
        problems += _share_problems(config, _weights(config, sources))
    return problems


def _setting_problems(config: Config) -> list[str]:
    """Settings that contradict each other or say nothing, whatever the files hold."""
    data, isolation, problems = config.data, config.training.document_isolation, []
    kinds = {_kind(config, source) for source in [*data.train, *data.valid]} or {data.kind}
    documents = PRETRAIN_PACKINGS.get(data.packing, "concat") if "pretrain" in kinds else None
    if not any(data.packing in PACKINGS[kind] for kind in kinds):
        allowed = ", ".join(dict.fromkeys(packing for kind in sorted(kinds) for packing in PACKINGS[kind]))
        named = " and ".join(sorted(kinds))
        problems.append(f"data.packing: {data.packing} does not go with data.kind {named}; use one of: {allowed}")
    if "chat" in kinds and not isolation:
        problems.append(
            "training.document_isolation: false does not go with data.kind chat, "
            "where the conversations of a row never see each other; remove it"
        )
    if documents == "best_fit" and not isolation:
        problems.append(
            "training.document_isolation: false does not go with data.packing best_fit, which puts documents into a row that "
            "have nothing to do with each other; remove it, or use packing concat"
        )
    if data.boundary_loss == "trained" and documents != "concat":
        problems.append(
            "data.boundary_loss: trained needs pretraining data with packing concat, "
            "where the next document of the file follows in the row; remove it"
        )
    if data.order == "megatron":
        if kinds != {"pretrain"} or documents != "concat":
            problems.append("data.order: megatron is for data.kind pretrain with packing concat; change it to shuffled")
        if any(source.epochs is not None for source in data.train):
            problems.append("data.order: megatron blends by weight; replace epochs in data.train by weight")
    if not data.train:
        problems.append("data.train: lists no data set; give at least one {path: PREFIX}, or set data.kind: synthetic")
    for name, count in Counter(_name(source) for source in data.valid).items():
        if count > 1:
            problems.append(f"data.valid: {count} sets are called {name!r}; give each its own name")
    return problems


def _all_sources(config: Config) -> Iterator[tuple[str, SourceConfig, int | None]]:
    """(place in the config, source, number in data.train or None) of every data set."""
    for index, source in enumerate(config.data.train):
        yield f"data.train.{index}.path", source, index
    for index, source in enumerate(config.data.valid):
        yield f"data.valid.{index}.path", source, None


def _vocabulary_problem(config: Config, dataset: IndexedDataset) -> str | None:
    size, meta = config.model.vocab_size, dataset.meta
    if meta is not None and meta.max_token_id < size:
        return None
    place = dataset.find_outside(size)
    if place is None:
        return None
    known = f" (tokenizer {meta.tokenizer}, {meta.vocab_size} tokens)" if meta else ""
    largest = dataset.max_token_id()
    return (
        f"{dataset.describe_token(place)} and ids up to {largest}{known}, but model.vocab_size is {size}; "
        f"preprocess with the model's tokenizer or {_more_tokens(config, max(largest + 1, meta.vocab_size if meta else 0))}"
    )


def _more_tokens(config: Config, size: int) -> str:
    if config.model.hf or config.model.checkpoint:
        return f"give the model more tokens with model.resize_vocab={size}"
    return f"set model.vocab_size to at least {size}"


def tokenizer_sizes(config: Config) -> dict[str, tuple[str, int]]:
    """(tokenizer, how many tokens it has) by place in the config, of every data set that knows it."""
    if config.data.kind == "synthetic":
        return {}
    found = {where: _open(config, source).meta for where, source, _ in _all_sources(config)}
    return {where: (meta.tokenizer, meta.vocab_size) for where, meta in found.items() if meta is not None}


def _tokenizer_problems(metas: dict[str, DatasetMeta]) -> list[str]:
    """`metas` by place in the config. Ids of two tokenizers mean different things."""
    problems = []
    first = next(iter(metas), "")
    for where, meta in metas.items():
        if meta.tokenizer_fingerprint != metas[first].tokenizer_fingerprint:
            problems.append(
                f"{where}: made with tokenizer {meta.tokenizer} (fingerprint {meta.tokenizer_fingerprint[:12]}), but {first} "
                f"with {metas[first].tokenizer} ({metas[first].tokenizer_fingerprint[:12]}); preprocess all with one tokenizer"
            )
    return problems


def _share_problems(config: Config, weights: list[float]) -> list[str]:
    """Sources whose share of the rows is too small for a blend to keep."""
    if config.data.order == "megatron":
        return []  # its blend rounds nothing
    try:
        counts = round_weights(weights)
    except ValueError as error:
        return [f"data.train: {error}"]
    problems, total = [], sum(weights)
    for index, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        share = weight / total
        if abs(count / RESOLUTION - share) > LARGEST_ROUNDING * share:
            problems.append(
                f"data.train.{index}: its share of the rows, {share:.3g}, would become {count}/{RESOLUTION} = "
                f"{count / RESOLUTION:.3g}, more than {LARGEST_ROUNDING:.0%} off; join small data sets of one kind "
                f"(`megatron-llm merge`), or give it more weight"
            )
    return problems


def _weights(config: Config, sources: Sequence[RowSource]) -> list[float]:
    """Weights of the sources of data.train: epochs become shares of the rows."""
    return [
        (source.weight or 1.0) if source.epochs is None else source.epochs * rows.rows_per_epoch
        for source, rows in zip(config.data.train, sources, strict=True)
    ]


def _blends_as_megatron(config: Config) -> bool:
    """Whether Megatron would make a blend: of several sources, and of one that has a weight, which then gets its margin."""
    data = config.data
    return data.order == "megatron" and (len(data.train) > 1 or data.train[0].weight is not None)


def _planned_rows(config: Config) -> int:
    return config.training.rows_after(max(1, config.training.steps))  # a run of 0 steps has a stream, too


def _open(config: Config, source: SourceConfig) -> IndexedDataset:
    return IndexedDataset(source.path, config.model.vocab_size)


def _train_rows(config: Config, index: int, dataset: IndexedDataset) -> RowSource:
    """Rows of data.train[index]. Raises ValueError if the data set cannot give what `data.*` wants."""
    data, training = config.data, config.training
    if data.order == "megatron":
        samples = _planned_rows(config)
        if _blends_as_megatron(config):
            samples = source_samples([source.weight or 1.0 for source in data.train], samples)[index]
        split, isolation = data.megatron_split, training.document_isolation
        return MegatronRows(dataset, training.sequence_length, training.seed, samples, split, isolation, _masked(config))
    seed = hash64(training.seed, index)
    return _rows(config, _kind(config, data.train[index]), dataset, seed, data.order == "shuffled", data.train_on)


def _valid_rows(config: Config, source: SourceConfig, dataset: IndexedDataset) -> RowSource:
    return _rows(config, _kind(config, source), dataset, config.training.seed, False, "assistant")


def _rows(
    config: Config, kind: str, dataset: IndexedDataset, seed: int, shuffled: bool, train_on: Literal["assistant", "all"]
) -> RowSource:
    data, length = config.data, config.training.sequence_length
    if kind == "chat":
        method = CHAT_PACKINGS.get(data.packing, CHAT_PACKINGS["auto"])
        return chat_rows(dataset, length, seed, shuffled, method, train_on, data.overlong)
    if data.packing == "best_fit":
        return document_rows(dataset, length, seed, shuffled)
    return PretrainRows(dataset, length, seed, shuffled, config.training.document_isolation, _masked(config))


def _masked(config: Config) -> bool:
    """Whether the last token of a document is kept from learning to predict the next one's first."""
    setting = config.data.boundary_loss
    return config.training.document_isolation if setting == "auto" else setting == "masked"


def _kind(config: Config, source: SourceConfig) -> str:
    return source.kind or config.data.kind


def _name(source: SourceConfig) -> str:
    return source.name or Path(source.path).name
