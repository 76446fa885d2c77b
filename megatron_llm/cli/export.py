"""`megatron-llm export`: a checkpoint as a Hugging Face folder or a Megatron checkpoint.

Small parts of tensors in memory, no GPU; one process, or several tasks that write a folder together.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from megatron_llm.cli.shards import add_shard, share_of, unfinished

if TYPE_CHECKING:
    from megatron_llm.checkpoint import Checkpoint
    from megatron_llm.hf.together import Share

HELP = "write a checkpoint as a Hugging Face folder or a Megatron checkpoint"

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `export`."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_DIR", help="a step folder, or a run folder: its newest whole checkpoint"
    )
    parser.add_argument("output", metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--to", choices=("hf", "megatron"), default="hf", help="what to write (default: hf)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of all tensors; default: as in the folder the run started from, else the run's own",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="of a run with LoRA: the adapters alone, as PEFT keeps them; default: merged"
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights that optimizer.ema_decay kept")
    parser.add_argument("--shard-size", type=parse_size, default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    add_shard(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's checksums first")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="to megatron: pad the vocabulary to a multiple of N (default: 128, as Megatron's)",
    )


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `1000`; units are decimal, as in transformers' `max_shard_size`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size


def run(args: argparse.Namespace) -> int:
    """Export and say what was written. Raises ValueError if there is no whole checkpoint or the output is in the way."""
    from tqdm import tqdm

    from megatron_llm.checkpoint import find_checkpoint
    from megatron_llm.exchange import export_megatron
    from megatron_llm.hf import export_hf

    checkpoint, share = find_checkpoint(args.checkpoint), share_of(args)
    if args.to == "megatron" and share.count > 1:
        raise ValueError("a Megatron checkpoint is written by one process; leave out --shard and torchrun")
    if not args.no_verify:
        total = checkpoint.nbytes // share.count
        with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, delay=2, disable=share.index > 0) as bar:
            problems = checkpoint.damaged(share.index, share.count, bar.update)  # whatever is exported, some task has read it
        if problems:
            raise ValueError("\n".join(problems))
    if args.ema and "ema" not in checkpoint.kinds:
        raise ValueError(
            f"{checkpoint.folder} has no average of the weights: it was trained without optimizer.ema_decay; leave out --ema"
        )
    if args.adapter:
        return _export_adapter(args, checkpoint, share)
    options: dict[str, Any] = {
        "dtype": _DTYPES[args.dtype] if args.dtype else None,
        "default_dtype": checkpoint.export_dtype,
        "shard_size": args.shard_size,
        "overwrite": args.overwrite,
        "progress": share.index == 0,
    }
    multiple = args.make_vocab_size_divisible_by
    if args.to == "megatron":
        options |= {"vocab_multiple": multiple} if multiple is not None else {}
    elif multiple is not None:
        raise ValueError("--make-vocab-size-divisible-by belongs to --to megatron; a Hugging Face folder has no padding")
    else:
        options |= {"share": share, "origin": f"{checkpoint.checksum} {args.ema}"}
    source, model = checkpoint.source("ema" if args.ema else "weights"), checkpoint.model
    export = export_megatron if args.to == "megatron" else export_hf
    files = export(source, model, checkpoint.assets, args.output, **options)
    print(f"{checkpoint.folder} -> {args.output}: {', '.join(files)}" if files else unfinished(args.output, share))
    return 0


def _export_adapter(args: argparse.Namespace, checkpoint: Checkpoint, share: Share) -> int:
    """Write the adapters of a checkpoint. Raises ValueError if it has none, or if more than adapters was trained."""
    from megatron_llm.config import OptimizerConfig, PeftConfig
    from megatron_llm.hf import export_adapter
    from megatron_llm.models.names import logical_tensors
    from megatron_llm.optim.rules import is_frozen

    if args.to == "megatron" or share.count > 1 or args.make_vocab_size_divisible_by is not None:
        raise ValueError("--adapter writes one small folder in PEFT's format: it goes with one process and --to hf")
    config, model = checkpoint.config, checkpoint.model
    if not config.get("peft"):
        raise ValueError(f"{checkpoint.folder} was not trained with LoRA: leave out --adapter")
    optimizer = OptimizerConfig(**config["optimizer"])
    if trained := [name for name, _ in logical_tensors(model) if not is_frozen(name, optimizer, adapters=True)]:
        raise ValueError(
            f"optimizer.rules had {len(trained)} weights trained beside the adapters ({trained[0]}, ...), which a folder of "
            "adapters has no place for; leave out --adapter, which exports the whole model"
        )
    files = export_adapter(
        checkpoint.state("ema" if args.ema else "weights"),
        model,
        PeftConfig(**config["peft"]),
        checkpoint.assets,
        args.output,
        base=config["model"]["hf"],
        dtype=_DTYPES[args.dtype] if args.dtype else None,
        overwrite=args.overwrite,
    )
    print(f"{checkpoint.folder} -> {args.output}: {', '.join(files)}")
    return 0
