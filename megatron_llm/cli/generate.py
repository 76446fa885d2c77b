"""`megatron-llm generate`: text from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_llm.config import ModelConfig
    from megatron_llm.parallel.shard import TensorSource

HELP = "generate text from a checkpoint or a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which prompts, how to sample."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run folder (its newest checkpoint)")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder, if none travels with the model")
    parser.add_argument("--chat", action="store_true", help="treat each prompt as a user's message, with the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens with total probability P"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPU, float32 on CPU"
    )


def run(args: argparse.Namespace) -> int:
    """Print each prompt's continuation. Raises ValueError if model, tokenizer or prompt cannot be used."""
    from megatron_llm.generation.generate import Sampling, generate
    from megatron_llm.training.build import DTYPES, build_model
    from megatron_llm.training.distributed import launched_world_size, pick_device

    if launched_world_size() > 1:
        raise ValueError("generate runs in one process; start it without torchrun")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    model, weights, files = _open_model(args)
    tokenizer = _open_tokenizer(args.tokenizer, files)
    prompts = [_encode(tokenizer, prompt, args.chat) for prompt in args.prompt]
    device = pick_device(args.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    stage = build_model(model, weights, DTYPES[dtype if args.dtype == "auto" else args.dtype], device)
    outputs = generate(
        stage,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop_ids=_stop_ids(tokenizer, files),
        seed=args.seed,
    )
    for prompt, ids in zip(args.prompt, outputs, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        print(text if args.chat else prompt + text)
    return 0


def _open_model(args: argparse.Namespace) -> tuple[ModelConfig, TensorSource, Mapping[str, bytes]]:
    """(architecture, weights, the files of a Hugging Face folder that come with them)."""
    from megatron_llm.checkpoint.folders import find_checkpoint
    from megatron_llm.config import ModelConfig
    from megatron_llm.hf.assets import CONFIG, collect_assets, exported_files
    from megatron_llm.hf.reader import HFFolder

    if args.hf is not None:
        folder = HFFolder(args.hf)
        model = ModelConfig(**folder.model_fields())
        weights: TensorSource = folder.source(model)
        assets = collect_assets(folder.path)
    else:
        checkpoint = find_checkpoint(args.checkpoint)
        checkpoint.verify()
        model = checkpoint.model
        weights, assets = checkpoint.source("weights"), checkpoint.assets
    files = exported_files(assets)
    return model, weights, files | {"config.json": assets[CONFIG]} if CONFIG in assets else files


def _open_tokenizer(folder: str | None, files: Mapping[str, bytes]) -> Any:
    """The tokenizer in `folder`, or the one that travels with the model."""
    import tempfile
    from pathlib import Path

    from megatron_llm.data.tokenizer import load_pretrained

    if folder is not None:
        return load_pretrained(folder)
    if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in files):
        raise ValueError("no tokenizer travels with this model; give one with --tokenizer DIR (training copies data.tokenizer)")
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in files.items():
            Path(temporary, name).write_bytes(content)
        return load_pretrained(temporary)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("--chat needs a tokenizer with a chat template, and this one has none")
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def _stop_ids(tokenizer: Any, files: Mapping[str, bytes]) -> frozenset[int]:
    """The ids that end a text, by the tokenizer and by the model's configs."""
    found = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        try:
            ids = json.loads(files.get(name, b"{}")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name} that comes with the model is no JSON object: {error}") from error
        ids = ids if isinstance(ids, list) else [ids]
        if not all(one is None or type(one) is int for one in ids):
            raise ValueError(f"{name} that comes with the model: eos_token_id {ids!r} must be token ids")
        found.update(ids)
    return frozenset(found - {None})
