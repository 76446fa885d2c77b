"""`megatron-llm inspect`: what is in a data set or a checkpoint."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_llm.data.indexed import IndexedDataset

HELP = "show what is in a data set or a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="PREFIX of PREFIX.bin, a checkpoint, or a run folder (its newest checkpoint)"
    )
    parser.add_argument(
        "--documents", type=int, default=3, metavar="N", help="data set: decode the first N documents (default: 3)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything and compare it with what the headers say")


def run(args: argparse.Namespace) -> int:
    if os.path.isdir(args.path):
        print(inspect_checkpoint(args.path, verify=args.verify))
    else:
        print(inspect_prefix(args.path, documents=args.documents, verify=args.verify))
    return 0


def inspect_checkpoint(path: str, verify: bool = False) -> str:
    """Where a run stood, what is stored, and by which versions, as text.

    With `verify` every file's checksum is computed. Raises ValueError for a missing or damaged checkpoint.
    """
    from megatron_llm.checkpoint.folders import find_checkpoint
    from megatron_llm.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(find_checkpoint(path))
    lines = [str(checkpoint.folder), "state: " + ", ".join(f"{key} {value:,}" for key, value in checkpoint.run_state.items())]
    for kind in checkpoint.kinds:
        tensors = checkpoint.tensors(kind)
        elements = sum(math.prod(info.shape) for info in tensors.values())
        size = sum(info.nbytes for info in tensors.values())
        lines.append(f"{kind}: {len(tensors)} tensors, {elements:,} elements, {size / 1e9:.3f} GB")
    lines.append("travelling along: " + (", ".join(sorted(checkpoint.assets)) or "nothing"))
    lines.append("written by: " + ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items()))
    if verify:
        checkpoint.verify()
        lines.append("verified: every file has the checksum of the manifest")
    return "\n".join(lines)


def inspect_prefix(prefix: str, documents: int = 3, verify: bool = False) -> str:
    """Counts, types, tokenizer, document lengths and the first documents of a data set, as text.

    With `verify` the whole index is checked and the largest token id compared with the meta file. Raises ValueError for a
    missing or damaged data set.
    """
    import numpy as np

    from megatron_llm.data.indexed import IndexedDataset

    dataset = IndexedDataset(prefix)
    meta = dataset.meta
    largest = f", largest id {meta.max_token_id:,}" if meta else ""
    lines = [f"{prefix}: {dataset.documents:,} documents, {len(dataset.tokens):,} tokens of {dataset.dtype.name}{largest}"]
    if meta:
        special = ", ".join(f"{name} {getattr(meta, name + '_id')}" for name in ("eod", "bos", "eos"))
        lines.append(f"kind: {meta.kind}")
        lines.append(
            f"tokenizer: {meta.tokenizer} ({meta.vocab_size:,} tokens; {special}; sha256 {meta.tokenizer_fingerprint[:16]})"
        )
    else:
        lines.append("no meta file: tokenizer unknown")
    lengths = np.diff(dataset.document_offsets())
    if len(lengths):
        marks = (0, 1, 10, 50, 90, 99, 100)
        values = np.percentile(lengths, marks, method="nearest")
        percentiles = ", ".join(f"{mark}%: {value:,}" for mark, value in zip(marks, values.tolist(), strict=True))
        lines.append(f"document length in tokens, percentiles: {percentiles}")
    if dataset.roles is not None:
        lines.append(_role_counts(dataset))
    if verify:
        lines.append(_verify(dataset))
    return "\n".join([*lines, *_first_documents(dataset, documents)])


def _role_counts(dataset: IndexedDataset) -> str:
    """Tokens of each role, and how many of the assistant's are trained."""
    import numpy as np

    from megatron_llm.data.indexed import BLOCK, NOT_TRAINED, ROLE_MASK, ROLES

    assert dataset.roles is not None
    counts = np.zeros(256, np.int64)
    for first in range(0, len(dataset.roles), BLOCK):
        counts += np.bincount(dataset.roles[first : first + BLOCK], minlength=256)
    codes = np.arange(256)
    parts = [f"{name} {counts[(codes & ROLE_MASK) == role].sum():,}" for name, role in ROLES.items()]
    trained = counts[(codes & (ROLE_MASK | NOT_TRAINED)) == ROLES["assistant"]].sum()
    return f"tokens by role: {', '.join(parts)}; trained: {trained:,}"


def _verify(dataset: IndexedDataset) -> str:
    """Raises ValueError if the index is inconsistent or the meta file names another largest id."""
    dataset.verify()
    largest = dataset.scan_max_token_id()
    if dataset.meta is not None and dataset.meta.max_token_id != largest:
        raise ValueError(
            f"{dataset.prefix}.meta.json says the largest token id is {dataset.meta.max_token_id}, but it is {largest}; "
            f"the .bin was changed: preprocess again"
        )
    return f"verified: index consistent, largest id {largest:,}"


def _first_documents(dataset: IndexedDataset, count: int) -> list[str]:
    """The first documents as text, if the tokenizer's folder is still there, else as ids."""
    from pathlib import Path

    from megatron_llm.data.tokenizer import fingerprint, load_encoder

    meta, encoder, lines = dataset.meta, None, []
    if meta and Path(meta.tokenizer).is_dir():
        if fingerprint(meta.tokenizer) == meta.tokenizer_fingerprint:
            encoder = load_encoder(meta.tokenizer)
        else:
            lines.append(f"{meta.tokenizer} holds another tokenizer now; showing ids")
    for document in range(min(count, dataset.documents)):
        ids = dataset.document(document)[:200].tolist()
        text = repr(encoder.decode(ids, skip_special_tokens=False)) if encoder else " ".join(map(str, ids))
        lines.append(f"document {document}: {text}")
    return lines
