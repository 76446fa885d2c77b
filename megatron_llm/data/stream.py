"""`TokenStream`: micro-batches by row number, from the data sets that a config names.

`training/loop.py` makes one stream for training and one per validation set; `training/step.py` asks each rank's stream
for the rows of its micro-batches. A stream is an endless pure function of row numbers, so the data-parallel size may
change between two starts and nobody broadcasts batches. `training/resolve.py` calls `check_data` before any process group exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_llm.config import Config, SourceConfig
from megatron_llm.data.blend import Blend, whole_weights
from megatron_llm.data.indexed import ROLES, DatasetMeta, IndexedDataset
from megatron_llm.data.megatron_order import MegatronBlend
from megatron_llm.data.rows import Row, RowSource, SyntheticRows
from megatron_llm.data.sources import (
    PACKINGS,
    PRETRAIN_PACKINGS,
    blend_weights,
    blends_as_megatron,
    kind_of,
    name_of,
    open_source,
    open_variants,
    planned_rows,
    rows_of_epochs,
    train_rows,
    valid_rows,
)
from megatron_llm.ops.batch import Batch

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
        dataset, variants = open_source(config, source), open_variants(config, source)
        name = f"{index}. {name_of(source)}" if len(data.train) > 1 else name_of(source)
        sources[name] = train_rows(config, index, dataset, variants)
        if data.order != "file":
            for each in (dataset, *variants.values()):
                each.expect_random_reads()
    weights = blend_weights(config, list(sources.values()))
    planned = planned_rows(config)
    blend: Blend | MegatronBlend = MegatronBlend(weights, planned) if blends_as_megatron(config) else Blend(weights)
    return TokenStream(sources, blend, length, planned_rows=planned)


def describe_data(config: Config) -> dict[str, Any]:
    """What is in the training data, to notice when it is not the same any more; reads few tokens. Empty for random ones.

    Raises ValueError for what `check_data` would have reported.
    """
    if config.data.kind == "synthetic":
        return {}
    described = []
    for source in config.data.train:
        found = _describe(open_source(config, source))
        if variants := open_variants(config, source):
            found["variants"] = {name: _describe(dataset) for name, dataset in variants.items()}
        described.append(found)
    return {"data": {"train": described}}


def _describe(dataset: IndexedDataset) -> dict[str, Any]:
    tokenizer = dataset.meta.tokenizer_fingerprint if dataset.meta else None
    counts = {"documents": dataset.documents, "tokens": len(dataset.tokens)}
    return {**counts, "tokenizer_fingerprint": tokenizer, "sample": _sample(dataset)}


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
        name_of(source): TokenStream(
            {name_of(source): valid_rows(config, source, open_source(config, source))}, Blend([1.0]), length, endless=False
        )
        for source in config.data.valid
    }


def steps_of_epochs(config: Config) -> int:
    """Steps in which each source of `data.train` is read as often as its `epochs` say, rounded down to whole steps."""
    rows = Fraction(0)
    for index, source in enumerate(config.data.train):
        assert source.epochs is not None
        read = train_rows(config, index, open_source(config, source), open_variants(config, source))
        rows += rows_of_epochs(source.epochs, read)
    return config.training.steps_within(int(rows))


def check_data(config: Config) -> list[str]:
    """Every problem with the data, one sentence each; none means the streams can be built. Raises nothing, reads little:
    headers, the index of data that is packed, role bytes, and all tokens only where no meta file knows the largest id."""
    if config.data.kind == "synthetic":
        return _chat_problems(config)
    problems = _setting_problems(config)
    sources: list[RowSource] = []
    metas: dict[str, DatasetMeta] = {}
    for where, source, index in _all_sources(config):
        try:
            dataset = open_source(config, source)
            if dataset.meta is not None:
                metas[where] = dataset.meta
            variants = {} if index is None else open_variants(config, source)
            found = (_vocabulary_problem(config, each) for each in (dataset, *variants.values()))
            problems += [f"{where}: {problem}" for problem in found if problem]
            if index is None:
                valid_rows(config, source, dataset)
            else:
                sources.append(train_rows(config, index, dataset, variants))
        except (ValueError, OSError) as error:
            problems.append(f"{where}: {error}")
    problems += _tokenizer_problems(metas)
    if sources and len(sources) == len(config.data.train):
        problems += _share_problems(config, blend_weights(config, sources))
    return problems


def _setting_problems(config: Config) -> list[str]:
    """Settings that contradict each other or say nothing, whatever the files hold."""
    data, isolation, problems = config.data, config.training.document_isolation, []
    kinds = {kind_of(config, source) for source in [*data.train, *data.valid]} or {data.kind}
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
    problems += _chat_problems(config)
    if not data.train:
        problems.append("data.train: lists no data set; give at least one {path: PREFIX}, or set data.kind: synthetic")
    return problems + _name_problems(config)


def _name_problems(config: Config) -> list[str]:
    """Validation sets that would have one name in the metrics, where NAME/user is what users say in the set NAME."""
    names = Counter(name_of(source) for source in config.data.valid)
    problems = [
        f"data.valid: {count} sets are called {name!r}; give each its own name" for name, count in names.items() if count > 1
    ]
    speaking = {name_of(source) for source in config.data.valid if kind_of(config, source) == "chat"}
    for name in names:
        whole, _, role = name.rpartition("/")
        if whole in speaking and role in ROLES:
            problems.append(f"data.valid: the metrics of {name!r} would be called as those of {role} in {whole!r}; rename one")
    return problems


def _chat_problems(config: Config) -> list[str]:
    """Settings of conversations that say nothing, or nothing that could be done."""
    data, problems = config.data, []
    trained: set[str] = {data.kind}
    kinds = trained
    if data.kind != "synthetic":
        trained = {kind_of(config, source) for source in data.train} or trained
        kinds = trained | {kind_of(config, source) for source in data.valid}
    for key, value, default in (
        ("train_on", data.train_on, "assistant"),
        ("prompt_loss_weight", data.prompt_loss_weight, 0.0),
        ("conversation_augment", data.conversation_augment.rates, {}),
    ):
        if value != default and "chat" not in trained:
            problems.append(
                f"data.{key}: {value} is for conversations, and data.train has none but kind {' and '.join(sorted(trained))}; "
                f"remove it, or set kind: chat"
            )
    if data.overlong != "error" and "chat" not in kinds:
        problems.append(f"data.overlong: {data.overlong} is for conversations, and there are none; remove it, or set kind: chat")
    if data.order == "short_to_long":
        if trained != {"chat"}:
            other = " and ".join(sorted(trained - {"chat"}))
            problems.append(
                f"data.order: short_to_long sorts conversations, and data.train has kind {other}, whose rows are all of one "
                f"length; change it to shuffled"
            )
        elif data.packing == "best_fit":
            problems.append(
                "data.order: short_to_long needs rows of like lengths, and packing best_fit puts short conversations beside long "
                "ones; remove data.packing, or set it to in_order or none"
            )
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
    found = {where: open_source(config, source).meta for where, source, _ in _all_sources(config)}
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
        counts = whole_weights(weights)
    except ValueError as error:
        return [f"data.train: {error}"]
    problems, total, period = [], sum(weights), sum(counts)
    for index, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        share = weight / total
        if abs(count / period - share) > LARGEST_ROUNDING * share:
            problems.append(
                f"data.train.{index}: its share of the rows, {share:.3g}, would become {count}/{period} = "
                f"{count / period:.3g}, more than {LARGEST_ROUNDING:.0%} off; join small data sets of one kind "
                f"(`megatron-llm merge`), or give it more weight"
            )
    return problems
