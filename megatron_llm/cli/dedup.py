"""`megatron-llm dedup`: remove equal and nearly equal documents from jsonl and parquet files."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "remove duplicate documents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl (plain, .gz, .zst, .bz2, .xz) or .parquet, folders, globs",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="gets one file of unchanged records for each input file")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument("--exact", action=switch, default=True, help="keep the first of equal texts (default: on)")
    parser.add_argument("--near", action=switch, default=True, help="keep the longest of near duplicates (default: on)")
    near = parser.add_argument_group("near duplicates (MinHash)")
    near.add_argument(
        "--similarity", type=float, default=0.8, metavar="S", help="Jaccard similarity that is found 9 times in 10 (default: 0.8)"
    )
    near.add_argument("--buckets", type=int, metavar="B", help="instead of --similarity, with --hashes-per-bucket")
    near.add_argument("--hashes-per-bucket", type=int, metavar="R", help="found with chance 1 - (1 - similarity^R)^B")
    near.add_argument("--ngram", type=int, default=5, metavar="N", help="words that are compared together (default: 5)")
    near.add_argument("--seed", type=int, default=1, metavar="SEED", help="of the hash functions (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--report", metavar="FILE", help="copy the JSON report there (report.json in the work folder)")
    parser.add_argument(
        "--work", metavar="DIR", help="intermediate files, logs, removed.jsonl, skipped.jsonl (default: OUTPUT.work)"
    )
    parser.add_argument("--tasks", type=int, metavar="N", help="parts the files are dealt to (default: one a file, at most 1000)")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at a time (default: local: cores; slurm: no limit)")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="where tasks run (default: local)")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--slurm-partition", metavar="NAME", help="partition of the jobs")
    slurm.add_argument("--slurm-time", default="24:00:00", metavar="TIME", help="limit of each job (default: 24:00:00)")
    slurm.add_argument("--slurm-memory", type=int, default=4, metavar="GB", help="memory of each task (default: 4)")
    slurm.add_argument(
        "--slurm-option", action="append", default=[], metavar="NAME=VALUE", help="option of sbatch; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.dedup import DedupOptions, Slurm, deduplicate

    options = DedupOptions(
        text_key=args.text_key,
        exact=args.exact,
        near=args.near,
        similarity=args.similarity,
        buckets=args.buckets,
        hashes_per_bucket=args.hashes_per_bucket,
        ngram=args.ngram,
        seed=args.seed,
        strict=args.strict,
        tasks=args.tasks,
    )
    slurm = None
    if args.executor == "slurm":
        if not args.slurm_partition:
            raise ValueError("--executor slurm needs --slurm-partition")
        slurm = Slurm(args.slurm_partition, args.slurm_time, args.slurm_memory, _sbatch_options(args.slurm_option))
    if options.near:
        print(describe_signature(options.signature))
    report = deduplicate(args.input, args.output, options, work=args.work, report=args.report, workers=args.workers, slurm=slurm)
    print("submitted; run the same command again when the jobs have ended" if report is None else summary(report))
    return 0


def _sbatch_options(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, value) in zip(texts, pairs, strict=True) if not (name and value)]
    if wrong:
        raise ValueError(f"--slurm-option {wrong[0]} is not NAME=VALUE, such as account=physics")
    return {name.removeprefix("--"): value for name, _, value in pairs}


def describe_signature(signature: Any) -> str:
    """The shape of the MinHash signature and what it finds, in a line."""
    chances = ", ".join(f"{signature.found(similarity):.1%} at {similarity}" for similarity in (0.5, 0.6, 0.7, 0.8, 0.9))
    return (
        f"near duplicates: {signature.buckets} buckets of {signature.hashes} hashes, threshold {signature.threshold:.2f}; "
        f"chance to find a pair by its similarity: {chances}"
    )


def summary(report: dict[str, Any]) -> str:
    """What went, for people; the report has the rest."""
    count, size = report["documents"], report["text_bytes"]
    share = f" ({size['kept'] / size['in']:.1%} of the text)" if size["in"] else ""
    lines = [
        f"documents: {count['in']:,} in, {count['kept']:,} kept{share}, {count['removed_exact']:,} equal texts and "
        f"{count['removed_near']:,} near duplicates removed, {count['skipped']:,} records skipped",
        f"text: {size['in'] / 1e6:,.1f} MB in, {size['kept'] / 1e6:,.1f} MB kept",
        *(f"skipped: {number:,} x {reason}" for reason, number in sorted(report["skipped"].items(), key=lambda it: -it[1])[:10]),
    ]
    for cluster in report["largest_clusters"][:3]:
        lines.append(f"cluster of {cluster['size']:,}: kept {_show(cluster['kept'])}")
        lines += [f"    removed {_show(member)}" for member in cluster["removed"]]
    lines.append(f"removed records: {report['removed_list']}; skipped records: {report['skipped_list']}")
    return "\n".join(lines)


def _show(member: dict[str, str]) -> str:
    return f"{member['id']}: {member['start'][:60]!r}"
