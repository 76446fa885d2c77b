"""What a data set looks like: document lengths, how often each id occurs, tokens by role, a check of all ids, a picture.

Called by the `inspect` command. Everything is read block by block, so memory does not grow with the data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import BLOCK, NOT_TRAINED, ROLE_MASK, ROLES, IndexedDataset

SPAN = 1 << 23  # tokens whose documents are looked up at a time
SHORT = 1 << 20  # lengths below are counted in a table, the others kept: a trillion tokens have at most a million of them
TOKEN_LIMIT = 1 << 28  # ids that are counted; of a larger data set, those of evenly spaced blocks
LARGEST_VOCABULARY = 1 << 22  # ids counted one by one where no meta file says how many there are

Counts = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class LengthCounts:
    """How many documents have how many tokens: `documents[i]` have `lengths[i]`. int64 [n] each, lengths ascending."""

    lengths: Counts
    documents: Counts

    def percentile(self, percent: float) -> int:
        """The least length that `percent` of the documents do not exceed. There must be a document."""
        ranks = np.cumsum(self.documents)
        return int(self.lengths[np.searchsorted(ranks, percent / 100 * int(ranks[-1]))])


@dataclass(frozen=True)
class TokenCounts:
    """How often ids occur.

    Attributes:
        counts: int64 [vocabulary], or up to the largest id counted without a meta file.
        outside: ids that are negative or beyond. read: tokens counted, all of them unless there are too many.
    """

    counts: Counts
    outside: int
    read: int

    def most_frequent(self, count: int) -> list[tuple[int, float]]:
        """(id, share of the tokens) of the `count` most frequent ids that occur at all, the most frequent first."""
        ids = np.argsort(-self.counts, kind="stable")[:count].tolist()
        return [(token, float(self.counts[token]) / self.read) for token in ids if self.counts[token]]


def length_counts(dataset: IndexedDataset) -> LengthCounts:
    """Tokens of every document. Raises ValueError if the index is damaged."""
    short, long, before = np.zeros(SHORT, np.int64), [], 0
    total = len(dataset.tokens)
    for first in _progress(range(0, total, SPAN), "document lengths"):
        starts = dataset.boundaries(first - 1, min(first + SPAN, total))
        ends = starts[starts > 0]
        lengths = np.diff(ends, prepend=before)
        before = int(ends[-1]) if len(ends) else before
        table = np.bincount(lengths[lengths < SHORT])
        short[: len(table)] += table
        long.append(lengths[lengths >= SHORT])
    last = np.asarray([total - before] if total else [], np.int64)
    short += np.bincount(last[last < SHORT], minlength=SHORT)
    kept, times = np.unique(np.concatenate([*long, last[last >= SHORT]]), return_counts=True)
    short[0] = dataset.documents - short.sum() - times.sum()  # empty documents have no token to start at
    seen = np.flatnonzero(short)
    return LengthCounts(np.concatenate((seen, kept)), np.concatenate((short[seen], times)))


def token_counts(dataset: IndexedDataset, limit: int = TOKEN_LIMIT) -> TokenCounts:
    """How often each id occurs in about `limit` tokens at most; more are sampled by evenly spaced blocks."""
    size = dataset.meta.vocab_size if dataset.meta is not None else LARGEST_VOCABULARY
    blocks = -(-len(dataset.tokens) // BLOCK)
    chosen = np.linspace(0, max(0, blocks - 1), min(blocks, max(1, limit // BLOCK))).astype(np.int64)
    counts, read = np.zeros(size + 1, np.int64), 0
    for block in _progress(chosen.tolist(), "token ids"):
        ids = dataset.tokens[block * BLOCK : (block + 1) * BLOCK].astype(np.int64)
        outside = (ids < 0) | (ids >= size)
        ids[outside] = size
        counts += np.bincount(ids, minlength=size + 1)
        read += len(ids)
    vocabulary = size if dataset.meta is not None else int(np.max(np.flatnonzero(counts[:-1]), initial=-1)) + 1
    return TokenCounts(counts[:vocabulary], int(counts[-1]), read)


def role_counts(roles: npt.NDArray[np.uint8]) -> tuple[dict[str, int], int]:
    """Tokens of each role, and how many of the assistant's are trained."""
    counts = np.zeros(256, np.int64)
    for first in range(0, len(roles), BLOCK):
        counts += np.bincount(roles[first : first + BLOCK], minlength=256)
    codes = np.arange(256)
    trained = counts[(codes & (ROLE_MASK | NOT_TRAINED)) == ROLES["assistant"]].sum()
    return {name: int(counts[(codes & ROLE_MASK) == role].sum()) for name, role in ROLES.items()}, int(trained)


def verify_data(dataset: IndexedDataset) -> int:
    """Read the whole index and all ids, and compare them with the meta file; returns the largest id.

    Raises ValueError naming file and byte of what is inconsistent, negative, or not in the vocabulary of the meta file.
    """
    dataset.verify()
    largest, meta = dataset.scan_max_token_id(), dataset.meta
    if meta is None or largest == meta.max_token_id < meta.vocab_size:
        return largest
    if largest >= meta.vocab_size:
        place = dataset.find_outside(meta.vocab_size)
        assert place is not None
        raise ValueError(
            f"{dataset.describe_token(place)}, outside the {meta.vocab_size} ids of its tokenizer {meta.tokenizer}; "
            f"the .bin was changed or belongs to another .meta.json: preprocess again"
        )
    raise ValueError(
        f"{dataset.prefix}.meta.json says the largest token id is {meta.max_token_id}, but it is {largest}; "
        f"the .bin was changed: preprocess again"
    )


def plot(path: str | Path, dataset: IndexedDataset, lengths: LengthCounts, tokens: TokenCounts) -> None:
    """Write a PNG: how long the documents are, and how often the ids occur by rank. Raises ValueError without tokens."""
    if not len(dataset.tokens):
        raise ValueError(f"{dataset.prefix} has no tokens to plot")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(12, 4.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(f"{dataset.prefix}: {dataset.documents:,} documents, {len(dataset.tokens):,} tokens", fontsize=13)
    left, right = figure.subplots(1, 2)
    _plot_lengths(left, lengths)
    _plot_ranks(right, tokens, len(dataset.tokens))
    for axes in (left, right):
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
            if axis.get_scale() == "log":
                axis.set_minor_formatter(LogFormatter())  # labels only where less than a decade is shown
    figure.savefig(str(path), format="png")


def _plot_lengths(axes: Any, counts: LengthCounts) -> None:
    some = counts.lengths > 0
    lengths, documents = counts.lengths[some], counts.documents[some]
    # Edges between whole numbers: no bin can be empty only because no whole number lies in it.
    edges = np.unique(np.round(np.geomspace(int(lengths[0]), int(lengths[-1]) + 1, 61))) - 0.5
    heights, _ = np.histogram(lengths, edges, weights=documents)
    axes.stairs(heights, edges, fill=True, color="#4c78a8")
    mean = float((lengths * documents).sum()) / int(counts.documents.sum())
    for value, name, style in ((counts.percentile(50), "median", "-"), (mean, "mean", "--"), (counts.percentile(99), "99%", ":")):
        axes.axvline(max(value, edges[0]), color="#e45756", linestyle=style, linewidth=1.3, label=f"{name} {value:,.0f}")
    empty = int(counts.documents[~some].sum())
    axes.set_title("Length of documents" + (f" ({empty:,} empty ones not shown)" if empty else ""), fontsize=11)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", xlim=(edges[0], edges[-1]), ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(framealpha=0.8, edgecolor="none")


def _plot_ranks(axes: Any, tokens: TokenCounts, total: int) -> None:
    counts = np.sort(tokens.counts[tokens.counts > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)
    axes.plot(ranks, counts, color="#4c78a8", linewidth=1.8, marker="o" if len(counts) == 1 else None)
    part = "" if tokens.read == total else f", in {tokens.read / total:.2%} of the tokens"
    axes.set_title(f"Frequency of ids: {len(counts):,} of {len(tokens.counts):,} occur{part}", fontsize=11)
    axes.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="times it occurs")
    axes.set(xlim=(0.9, max(10, len(counts) * 1.1)), ylim=(0.8, None))


def _progress(items: Iterable[T], what: str) -> Iterable[T]:
    """A bar on a terminal, if it takes longer than two seconds."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, delay=2, leave=False, disable=None)
    return bar
