"""`megatron-llm chat`: a conversation with a checkpoint or a Hugging Face folder, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from megatron_llm.cli.generate import add_model, add_sampling, place_of

if TYPE_CHECKING:
    from megatron_llm.generation.chat import Conversation

HELP = "talk to a checkpoint or a Hugging Face folder, with its chat template"

COMMANDS = "/reset begins anew, /system TEXT sets the system message and begins anew, /quit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it replies."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    add_sampling(parser, max_new_tokens=1024, temperature=0.7)


def run(args: argparse.Namespace) -> int:
    """Reply to every line of the input until it ends. Replies go to stdout, all else to stderr."""
    from megatron_llm.generation.chat import Conversation
    from megatron_llm.generation.generate import Sampling
    from megatron_llm.generation.model import stop_ids
    from megatron_llm.training.build import DTYPES, build_model
    from megatron_llm.training.distributed import launched_world_size, pick_device

    if launched_world_size() > 1:
        raise ValueError("chat runs in one process; start it without torchrun")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    sampling, opened = Sampling(args.temperature, args.top_k, args.top_p), place_of(args).open(verify=True)
    tokenizer = opened.tokenizer(args.tokenizer)
    if not tokenizer.chat_template:
        raise ValueError("chat needs a tokenizer with a chat template, and this one has none; see --tokenizer")
    device = pick_device(args.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = build_model(opened.config, opened.weights, DTYPES[dtype if args.dtype == "auto" else args.dtype], device)
    ends = stop_ids(tokenizer, opened.files)
    conversation = Conversation(model, tokenizer, sampling, ends, args.max_new_tokens, args.seed, args.system)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to end
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its line editing

        _say(f"{COMMANDS}; Ctrl-C stops a reply.")
    _converse(conversation, "> " if sys.stdin.isatty() else "")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _converse(conversation: Conversation, prompt: str) -> None:
    """Read lines and answer them until /quit, the end of the input, or Ctrl-C when no reply is under way."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            _say("")
            return
        command = re.match(r"/[a-z]+(?=\s|$)", line)
        if command and command[0] == "/quit":
            return
        if command:
            _obey(conversation, command[0], line[command.end() :].strip())
        elif line:
            _answer(conversation, line)


def _obey(conversation: Conversation, command: str, text: str) -> None:
    if command == "/reset":
        conversation.messages = []
        _say("a new conversation")
    elif command == "/system":
        conversation.messages, conversation.system = [], text or None
        _say("a new conversation, with this system message" if text else "a new conversation, without a system message")
    else:
        _say(f"{command} is no command: {COMMANDS}")


def _answer(conversation: Conversation, line: str) -> None:
    """Print the reply as it comes. Ctrl-C ends it; what cannot be answered is said and forgotten."""
    try:
        with closing(conversation.reply(line)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        _say(f"error: {error}; the message is forgotten")
        return
    print(flush=True)
