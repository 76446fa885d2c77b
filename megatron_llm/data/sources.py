"""Rows of each data set that a config names. Called by `stream.py`, which blends them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_llm.config import Config, SourceConfig
from megatron_llm.data.chat_rows import VALIDATION, ConversationPieces, Loss, Variant
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.megatron_order import MegatronRows, source_samples
from megatron_llm.data.order import hash64
from megatron_llm.data.packing import Method
from megatron_llm.data.rows import Order, PackedRows, PretrainRows, RowSource, document_rows

PRETRAIN_PACKINGS = {"auto": "concat", "concat": "concat", "best_fit": "best_fit"}  # what data.packing may say -> what is done
CHAT_PACKINGS: dict[str, Method] = {"auto": "best_fit", "best_fit": "best_fit", "in_order": "in_order", "none": "none"}
PACKINGS = {"pretrain": PRETRAIN_PACKINGS.keys(), "chat": CHAT_PACKINGS.keys()}


def open_source(config: Config, source: SourceConfig) -> IndexedDataset:
    return IndexedDataset(source.path, config.model.vocab_size)


def open_variants(config: Config, source: SourceConfig) -> dict[str, IndexedDataset]:
    """The data sets that conversations of a training source may be replaced from, by name.

    Raises ValueError if one is missing or made from something else.
    """
    if kind_of(config, source) != "chat":
        return {}
    base, opened = open_source(config, source), {}
    for name in config.data.conversation_augment.rates:
        prefix = f"{source.path}.{name}"
        mend = (
            f"make it with `megatron-llm preprocess-chat ... --output {source.path} --variants {name}`, from the same input, or "
            f"remove data.conversation_augment.{name}"
        )
        try:
            found = IndexedDataset(prefix, config.model.vocab_size)
        except ValueError as error:
            raise ValueError(f"data.conversation_augment.{name} needs {prefix}: {error}; {mend}") from error
        if found.documents != base.documents:
            raise ValueError(f"{prefix} has {found.documents} documents, but {source.path} has {base.documents}; {mend}")
        prints = [None if each.meta is None else each.meta.tokenizer_fingerprint for each in (found, base)]
        if None not in prints and prints[0] != prints[1]:
            short = [str(each)[:12] for each in prints]
            raise ValueError(f"{prefix} was made with tokenizer {short[0]}, but {source.path} with {short[1]}; {mend}")
        makers = {each.meta.made_by for each in (found, base) if each.meta is not None and each.meta.made_by is not None}
        if len(makers) > 1:
            raise ValueError(f"{prefix} and {source.path} were made by different commands, so they may not correspond; {mend}")
        opened[name] = found
    return opened


def train_rows(config: Config, index: int, dataset: IndexedDataset, variants: dict[str, IndexedDataset]) -> RowSource:
    """Rows of data.train[index]. Raises ValueError if the data set cannot give what `data.*` wants."""
    data, training = config.data, config.training
    if data.order == "megatron":
        samples = planned_rows(config)
        if blends_as_megatron(config):
            samples = source_samples([source.weight or 1.0 for source in data.train], samples)[index]
        split, isolation = data.megatron_split, training.document_isolation
        return MegatronRows(dataset, training.sequence_length, training.seed, samples, split, isolation, _masked(config))
    seed = hash64(training.seed, index)
    if kind_of(config, data.train[index]) != "chat":
        return _text_rows(config, dataset, seed, data.order == "shuffled")
    augment = data.conversation_augment
    chosen_by = hash64(training.seed if augment.seed is None else augment.seed, index)
    chosen = [Variant(name, variants[name], rate) for name, rate in augment.rates.items()]
    loss = Loss(data.train_on, data.prompt_loss_weight)
    pieces = ConversationPieces(dataset, training.sequence_length, loss, data.overlong, chosen, chosen_by)
    return _packed(config, pieces, seed, data.order)


def valid_rows(config: Config, source: SourceConfig, dataset: IndexedDataset) -> RowSource:
    if kind_of(config, source) != "chat":
        return _text_rows(config, dataset, config.training.seed, False)
    pieces = ConversationPieces(dataset, config.training.sequence_length, VALIDATION, config.data.overlong)
    return _packed(config, pieces, config.training.seed, "file")


def _packed(config: Config, pieces: ConversationPieces, seed: int, order: Order) -> PackedRows:
    method = CHAT_PACKINGS.get(config.data.packing, CHAT_PACKINGS["auto"])
    if order == "short_to_long" and method == "best_fit":
        method = "in_order"
    return PackedRows(pieces, config.training.sequence_length, seed, order, method)


def _text_rows(config: Config, dataset: IndexedDataset, seed: int, shuffled: bool) -> RowSource:
    length = config.training.sequence_length
    if config.data.packing == "best_fit":
        return document_rows(dataset, length, seed, shuffled)
    return PretrainRows(dataset, length, seed, shuffled, config.training.document_isolation, _masked(config))


def blend_weights(config: Config, sources: Sequence[RowSource]) -> list[float]:
    """Weights of the sources of data.train: epochs become rows."""
    return [
        (source.weight or 1.0) if source.epochs is None else float(rows_of_epochs(source.epochs, rows))
        for source, rows in zip(config.data.train, sources, strict=True)
    ]


def rows_of_epochs(epochs: float, rows: RowSource) -> Fraction:
    """As written: 0.29 epochs of 100 rows are 29 rows, though 0.29 * 100 is 28.999999999999996."""
    return Fraction(str(epochs)) * rows.rows_per_epoch


def blends_as_megatron(config: Config) -> bool:
    """Whether Megatron would make a blend: of several sources, and of one that has a weight, which then gets its margin."""
    data = config.data
    return data.order == "megatron" and (len(data.train) > 1 or data.train[0].weight is not None)


def planned_rows(config: Config) -> int:
    return config.training.rows_after(max(1, config.training.steps))  # a run of 0 steps has a stream, too


def _masked(config: Config) -> bool:
    """Whether the last token of a document is kept from learning to predict the next one's first."""
    setting = config.data.boundary_loss
    return config.training.document_isolation if setting == "auto" else setting == "masked"


def kind_of(config: Config, source: SourceConfig) -> str:
    return source.kind or config.data.kind


def name_of(source: SourceConfig) -> str:
    return source.name or Path(source.path).name
