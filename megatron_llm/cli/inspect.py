"""`megatron-llm inspect`: what is in a data set or a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
    from megatron_llm.data.statistics import TokenCounts

HELP = "show what is in a data set or a checkpoint"
SHOWN_TOKENS = 200  # of a decoded document
FREQUENT = 10  # ids listed

Decoder = Callable[[Sequence[int]], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="PREFIX of PREFIX.bin, a checkpoint, or a run folder (its newest checkpoint)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything and compare it with what the headers say")
    data = parser.add_argument_group("data sets")
    data.add_argument("--documents", type=int, default=3, metavar="N", help="decode the first N documents (default: 3)")
    data.add_argument("--random", type=int, metavar="SEED", help="decode N documents from all over instead, drawn by this seed")
    data.add_argument("--show", type=int, metavar="N", help="print N documents of chat data token by token, with roles, instead")
    data.add_argument("--show-ids", action="store_true", help="with --show: the id of each token too")
    data.add_argument("--plot", metavar="FILE.png", help="draw document lengths and token frequencies")
    data.add_argument("--tokenizer", metavar="PATH", help="decode with this one, if it is not where it was at preprocessing")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if Path(f"{path}.idx").is_file() and args.show is not None:
        show_prefix(str(path), args.show, args.random, args.tokenizer, args.show_ids)
    elif Path(f"{path}.idx").is_file():
        print(inspect_prefix(str(path), args.documents, args.random, args.verify, args.plot, args.tokenizer))
    elif "://" in args.path:
        print(inspect_checkpoint(args.path, verify=args.verify))
    elif path.is_dir():
        inside = _prefixes(path)
        if inside:
            raise ValueError(f"{path} is a folder of data sets; inspect one of them: {', '.join(inside)}")
        if args.plot:
            raise ValueError(f"--plot is for data sets, and {path} is a folder")
        print(inspect_checkpoint(args.path, verify=args.verify))
    else:
        raise ValueError(_missing(path))
    return 0


def inspect_checkpoint(path: str, verify: bool = False) -> str:
    """Where a run stood, what is stored, and by which versions, as text.

    With `verify` every file's checksum is computed. Raises ValueError for a missing or damaged checkpoint.
    """
    from tqdm import tqdm

    from megatron_llm.checkpoint.folders import find_checkpoint

    checkpoint = find_checkpoint(path)
    numbers = {key: value for key, value in checkpoint.run_state.items() if not isinstance(value, list)}
    lines = [str(checkpoint.folder), "state: " + ", ".join(f"{key} {value:,}" for key, value in numbers.items())]
    if skipped := checkpoint.run_state.get("skipped_rows"):
        lines.append("rows left out: " + ", ".join(f"[{start}, {stop})" for start, stop in skipped))
    for kind in checkpoint.kinds:
        tensors = checkpoint.tensors(kind)
        elements = sum(math.prod(info.shape) for info in tensors.values())
        size = sum(info.nbytes for info in tensors.values())
        lines.append(f"{kind}: {len(tensors)} tensors, {elements:,} elements, {size / 1e9:.3f} GB")
    lines.append("travelling along: " + (", ".join(sorted(checkpoint.assets)) or "nothing"))
    lines.append("written by: " + ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items()))
    if verify:
        with tqdm(total=checkpoint.nbytes, desc="Verifying", unit="B", unit_scale=True, delay=2) as bar:
            checkpoint.verify(bar.update)
        lines.append("verified: every file has the checksum of the manifest")
    return "\n".join(lines)


def inspect_prefix(
    prefix: str,
    documents: int = 3,
    random_seed: int | None = None,
    verify: bool = False,
    plot: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """What a data set holds, as text: counts, lengths, frequent ids, some documents; `plot` names a picture to write.

    With `verify` the whole index and all ids are checked first. Raises ValueError for a missing or damaged data set.
    """
    from megatron_llm.data import statistics
    from megatron_llm.data.indexed import IndexedDataset

    dataset = IndexedDataset(prefix)
    largest = f", largest id {dataset.meta.max_token_id:,}" if dataset.meta else ""
    lines = [f"{prefix}: {dataset.documents:,} documents, {len(dataset.tokens):,} tokens of {dataset.dtype.name}{largest}"]
    lines += _describe_meta(dataset.meta) if dataset.meta else ["no meta file: tokenizer unknown"]
    if verify:
        lines.append(f"verified: index consistent, largest id {statistics.verify_data(dataset):,}")
    lengths, tokens = statistics.length_counts(dataset), statistics.token_counts(dataset)
    decode, problem = _decoder(dataset.meta, tokenizer)
    if dataset.documents:
        marks = ", ".join(f"{mark}%: {lengths.percentile(mark):,}" for mark in (0, 1, 10, 50, 90, 99, 100))
        mean = len(dataset.tokens) / dataset.documents
        lines.append(f"document length in tokens: mean {mean:,.1f}; percentiles {marks}")
    if dataset.roles is not None:
        roles, trained = statistics.role_counts(dataset.roles)
        lines.append(f"tokens by role: {', '.join(f'{name} {count:,}' for name, count in roles.items())}; trained: {trained:,}")
    lines += _describe_tokens(dataset, tokens, decode)
    if plot is not None:
        statistics.plot(plot, dataset, lengths, tokens)
        lines.append(f"picture: {plot}")
    lines += [problem] if problem and documents > 0 and dataset.documents else []
    return "\n".join([*lines, *_documents(dataset, documents, random_seed, decode)])


def show_prefix(prefix: str, count: int, random_seed: int | None, tokenizer: str | None, with_ids: bool) -> None:
    """Print documents token by token. Raises ValueError if the data set has no roles or its tokenizer is not to be had."""
    from megatron_llm.data.indexed import IndexedDataset
    from megatron_llm.data.prepare.show import show_dataset, use_colours

    dataset = IndexedDataset(prefix)
    decode, problem = _decoder(dataset.meta, tokenizer)
    if decode is None:
        raise ValueError(problem or f"{prefix} does not say which tokenizer made it; give it with --tokenizer")
    for line in show_dataset(dataset, _numbers(dataset, count, random_seed), decode, colour=use_colours(), with_ids=with_ids):
        print(line)


def _describe_meta(meta: DatasetMeta) -> list[str]:
    special = ", ".join(f"{name} {getattr(meta, name + '_id')}" for name in ("eod", "bos", "eos"))
    lines = [f"kind: {meta.kind}" + (f", shard {meta.shard[0]} of {meta.shard[1]}" if meta.shard else "")]
    lines.append(f"tokenizer: {meta.tokenizer} ({meta.vocab_size:,} tokens; {special}; sha256 {meta.tokenizer_fingerprint[:16]})")
    if meta.input_bytes and meta.tokens:
        lines.append(f"made from {meta.input_bytes:,} bytes of input, {meta.input_bytes / meta.tokens:.2f} a token")
    if len(meta.weights) > 1:
        lines.append(f"loss weights of messages: {', '.join(f'{weight:g}' for weight in meta.weights)}")
    if meta.formats:
        lines.append(f"formats of the records: {', '.join(f'{name} {count:,}' for name, count in meta.formats.items())}")
    if meta.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(meta.skipped.items(), key=lambda item: -item[1]))
        what = "records not taken" if meta.variant is None else f"documents empty, for want of the variant {meta.variant}"
        lines.append(f"{what}: {sum(meta.skipped.values()):,} ({reasons})")
    return lines


def _describe_tokens(dataset: IndexedDataset, tokens: TokenCounts, decode: Decoder | None) -> list[str]:
    """How much of the vocabulary occurs, and the most frequent ids."""
    total, size = len(dataset.tokens), len(tokens.counts)
    if total == 0:
        return []
    seen = int((tokens.counts > 0).sum())
    part = "" if tokens.read == total else f" (in {tokens.read:,} tokens, {tokens.read / total:.2%}, in evenly spaced blocks)"
    lines = [f"ids that occur: {seen:,} of {size:,}; {1 - seen / size:.1%} of the vocabulary never{part}"]
    if dataset.meta is None or size == 0:
        lines = [f"ids that occur: {seen:,}{part}"]
    if tokens.outside:
        lines.append(f"ids outside the vocabulary: {tokens.outside:,}; --verify says where the first one is")
    lines.append("most frequent ids:")
    for token, share in tokens.most_frequent(FREQUENT):
        lines.append(f"{share:8.2%} {token:8}" + (f"  {decode([token])!r}" if decode else ""))
    return lines


def _decoder(meta: DatasetMeta | None, tokenizer: str | None) -> tuple[Decoder | None, str]:
    """Ids to text; None and the reason if the tokenizer is not to be had. Raises ValueError for a wrong `tokenizer`."""
    from megatron_llm.data.tokenizer import load_decoder, path_fingerprint

    path = tokenizer or (meta.tokenizer if meta else None)
    if path is None:
        return None, ""
    try:
        if meta is not None and (found := path_fingerprint(path)) != meta.tokenizer_fingerprint:
            made_with = f"sha256 {found[:16]}, the data set was made with {meta.tokenizer_fingerprint[:16]}"
            raise ValueError(f"{path} holds another tokenizer now ({made_with})")
        return load_decoder(path), ""
    except ValueError as error:
        if tokenizer:
            raise
        return None, f"ids instead of text: {error}; --tokenizer PATH names the right one"


def _numbers(dataset: IndexedDataset, count: int, random_seed: int | None) -> Sequence[int]:
    """The first `count` documents, or as many from all over."""
    import random

    count = max(0, min(count, dataset.documents))
    if random_seed is None:
        return range(count)
    return sorted(random.Random(random_seed).sample(range(dataset.documents), count))


def _documents(dataset: IndexedDataset, count: int, random_seed: int | None, decode: Decoder | None) -> list[str]:
    """The start of some documents, as text or as ids."""
    lines = []
    for number in _numbers(dataset, count, random_seed):
        document = dataset.document(number)
        ids = document[:SHOWN_TOKENS].tolist()
        text = repr(decode(ids)) if decode else " ".join(map(str, ids))
        lines.append(f"document {number}: {text}" + (f" ... ({len(document):,} tokens)" if len(document) > len(ids) else ""))
    return lines


def _prefixes(folder: Path) -> list[str]:
    """Data sets in a folder."""
    return sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))


def _missing(path: Path) -> str:
    """What to say about a path that is nothing: users give a file instead of the prefix, or mistype."""
    import difflib

    for suffix in (".bin", ".idx", ".meta.json", ".roles.bin"):
        prefix = str(path).removesuffix(suffix)
        if prefix != str(path) and Path(f"{prefix}.idx").is_file():
            return f"{path} is a file of a data set; give its prefix: megatron-llm inspect {prefix}"
    others = {Path(prefix).name: prefix for prefix in _prefixes(path.parent)}
    names = [name for name in others if name.startswith(path.name)] or difflib.get_close_matches(path.name, others)
    near = [others[name] for name in names]
    hint = f"did you mean {' or '.join(near)}?" if near else "a data set is PREFIX.bin and PREFIX.idx"
    return f"{path}.idx does not exist, nor is {path} a checkpoint; {hint}"
