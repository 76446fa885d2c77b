"""`megatron-llm generate`: text from a checkpoint or a Hugging Face folder, on one device or over several."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_llm.generation.model import Place
    from megatron_llm.generation.prompts import Prompt

HELP = "generate text from a checkpoint or a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which prompts, how to sample, over how many devices."""
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='a prompt a line; in *.jsonl a string, {"prompt": TEXT} or {"messages": [...]}, which the chat template renders',
    )
    parser.add_argument("--chat", action="store_true", help="treat each prompt as a user's message, with the chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each conversation; implies --chat")
    parser.add_argument(
        "--output", metavar="FILE", help="write {prompt, reply, ended} as a line of JSON for each instead of text"
    )
    add_sampling(parser, max_new_tokens=128, temperature=0.0)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at a time (default: 32)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share every layer")
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share out the layers; with either the command starts its ranks, unless torchrun has",
    )
    parser.add_argument(
        "--timeout", type=float, default=86400, metavar="SECONDS", help="that several ranks may take (default: a day)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and where it runs, of every command that makes text."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run folder (its newest checkpoint)")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder, if none travels with the model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPU, float32 on CPU"
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The options that say how tokens are chosen, and how many."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default: {max_new_tokens}")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0: always the most likely token (default: {temperature:g})"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens with total probability P"
    )
    parser.add_argument("--seed", type=int, default=0)


def place_of(args: argparse.Namespace) -> Place:
    """The model that `add_model`'s options name."""
    from megatron_llm.generation.model import Place

    return Place(args.hf, args.checkpoint)


def run(args: argparse.Namespace) -> int:
    """Print each prompt's continuation. Raises ValueError if model, tokenizer, prompt or layout cannot be used."""
    from megatron_llm.generation.generate import Sampling
    from megatron_llm.generation.model import stop_ids
    from megatron_llm.generation.prompts import encode, read_prompts
    from megatron_llm.training.distributed import launched_rank
    from megatron_llm.training.inference import GenerationRequest, run_request

    for option in ("max_new_tokens", "batch_size", "tensor_parallel", "pipeline_parallel"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1")
    sampling, place, chat = (
        Sampling(args.temperature, args.top_k, args.top_p),
        place_of(args),
        args.chat or args.system is not None,
    )
    opened = place.open(verify=launched_rank() == 0)
    tokenizer = opened.tokenizer(args.tokenizer)
    prompts: list[Prompt] = read_prompts(args.prompts) if args.prompts is not None else args.prompt
    ends = stop_ids(tokenizer, opened.files)
    request = GenerationRequest(
        place,
        [encode(tokenizer, prompt, chat, args.system) for prompt in prompts],
        args.max_new_tokens,
        sampling,
        ends,
        args.seed,
        args.batch_size,
        args.tensor_parallel,
        args.pipeline_parallel,
        args.device,
        args.dtype,
        args.timeout,
    )
    if args.output is not None and launched_rank() == 0:
        open(args.output, "w").close()  # whether it can be written is known before all the work
    replies = run_request(request)
    if replies is not None:
        _show(args, prompts, replies, tokenizer, ends, chat)
    return 0


def _show(
    args: argparse.Namespace, prompts: list[Prompt], replies: list[list[int]], tokenizer: Any, ends: frozenset[int], chat: bool
) -> None:
    """Write the replies where they are wanted."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    if args.output is None:
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text if isinstance(prompt, str) and not chat else text)
        return
    with open(args.output, "w", encoding="utf-8") as file:
        for prompt, text, ids in zip(prompts, texts, replies, strict=True):
            name = "prompt" if isinstance(prompt, str) else "messages"
            line = {name: prompt, "reply": text, "ended": ids[-1] in ends}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
