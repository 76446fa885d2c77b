"""`megatron-llm verify`: does this engine compute what transformers computes with a Hugging Face folder?"""

from __future__ import annotations

import argparse
import sys

HELP = "prove that a Hugging Face folder computes here what it computes in transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folder, on what text, in which layouts, and how near is near."""
    parser.usage = (  # argparse would put HF_DIR last, where --layouts takes it for one more
        "%(prog)s HF_DIR [--layouts L ...] [--text FILE] [--tokens N] [--dtype float32|bfloat16] [--tolerance X] "
        "[--device auto|cpu|cuda] [--timeout SECONDS]"
    )
    parser.add_argument("folder", metavar="HF_DIR", help="a Hugging Face folder; code in it is never run")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="L",
        help="also over several processes, which the command starts on the CPU: tp2, pp2, tp2pp2, ...; dp has no part in it. "
        "Under torchrun, which may use GPUs, over its ranks",
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: one of several languages, or random ids)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of all documents together (default: 256)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of this engine; always compared with transformers in float32 (default: float32)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference of a logit, as a part of the largest logit, and of the loss, as a part of it (default: 0.0001; "
        "bfloat16: three times that of transformers in bfloat16)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="SECONDS", help="that a layout, or a wait, may take (default: 1800)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each comparison. Returns 1 if one is past the tolerance; raises ValueError for unusable input."""
    from functools import partial

    from megatron_llm.training.distributed import launched_rank
    from megatron_llm.training.launcher import leave_after_rank_0
    from megatron_llm.training.verify import Request, verify

    request = Request(
        args.folder, tuple(args.layouts), args.text, args.tokens, args.dtype, args.tolerance, args.device, args.timeout
    )
    problems = verify(request, partial(print, flush=True))
    if launched_rank() == 0:
        print("\n".join(f"FAILED: {problem}" for problem in problems), file=sys.stderr) if problems else print("verified")
    elif problems:
        leave_after_rank_0()
    return 1 if problems else 0
