"""Files of tiktoken: one line a token, base64 of its bytes and its rank. The regex and the special tokens are not in them.

Both come from `NAME.json` beside the file NAME if there is one:

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}, "eos": "<|endoftext|>", "bos": null}

and else from the table of published files, by name. Called by `data/tokenizer.py` and `data/prepare/encoding.py`.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The regexes as tiktoken and the models' own code spell them (OpenAI's tiktoken_ext, Meta's llama3, Alibaba's Qwen).
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 246)),
]


@dataclass(frozen=True)
class TiktokenSpec:
    """What a file of tiktoken does not say. `bos` and `eos` are names of `special_tokens`."""

    pattern: str
    special_tokens: dict[str, int]
    eos: str | None = None
    bos: str | None = None


def _after(ranks: int, names: list[str]) -> dict[str, int]:
    return {name: ranks + index for index, name in enumerate(names)}


_END = "<|endoftext|>"
# Number of ranks in the published file, which tells it from another one of the same name, and its spec.
_R50K = (50256, TiktokenSpec(GPT2, {_END: 50256}, _END))
PUBLISHED: dict[str, tuple[int, TiktokenSpec]] = {
    "gpt2": _R50K,
    "r50k_base": _R50K,
    "p50k_base": (50280, TiktokenSpec(GPT2, {_END: 50256}, _END)),
    "cl100k_base": (
        100256,
        TiktokenSpec(
            CL100K,
            _after(100257, [_END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]) | {"<|endofprompt|>": 100276},
            _END,
        ),
    ),
    "o200k_base": (199998, TiktokenSpec(O200K, {_END: 199999, "<|endofprompt|>": 200018}, _END)),
    "qwen": (
        151643,
        TiktokenSpec(
            QWEN, _after(151643, [_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]), _END
        ),
    ),
    "tokenizer": (  # Llama 3 and its successors ship it as tokenizer.model
        128000,
        TiktokenSpec(LLAMA3, _after(128000, LLAMA3_SPECIAL), "<|end_of_text|>", "<|begin_of_text|>"),
    ),
}


def spec_path(path: Path) -> Path:
    """Where the JSON of a file of tiktoken may lie."""
    return path.with_name(path.name + ".json")


def parse_rank(line: bytes) -> tuple[bytes, int] | None:
    """Bytes and rank of a token; None if the line is none of a file of tiktoken."""
    token, _, rank = line.rstrip(b"\r\n").partition(b" ")
    try:
        return base64.b64decode(token, validate=True), int(rank) if rank.isdigit() else int("")
    except (binascii.Error, ValueError):
        return None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank by bytes. Raises ValueError naming file and line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        parsed = parse_rank(line)
        if parsed is None:
            raise ValueError(f"{path}:{number}: expected base64, a space and a rank, found {line[:80]!r}")
        ranks[parsed[0]] = parsed[1]
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} has no token for {len(missing)} of the 256 single bytes, the first is {missing[0]:#04x}")
    return ranks


def read_spec(path: Path, ranks: dict[bytes, int]) -> TiktokenSpec:
    """Regex and special tokens of a file with these ranks. Raises ValueError if nothing says them, or what says them is wrong."""
    beside = spec_path(path)
    if beside.is_file():
        return _parse_spec(beside, set(ranks.values()))
    count, spec = PUBLISHED.get(path.name.removesuffix(".tiktoken").removesuffix(".model"), (-1, None))
    if spec is not None and count == len(ranks):
        return spec
    what = (
        "its name is not that of a published file"
        if spec is None
        else f"the published one has {count:,} ranks, not {len(ranks):,}"
    )
    raise ValueError(
        f"{path}: a file of tiktoken does not hold its regex and special tokens, and {what} ({', '.join(PUBLISHED)}); "
        f'write {beside.name} beside it: {{"pattern": REGEX, "special_tokens": {{NAME: ID}}, "eos": NAME}}'
    )


def _parse_spec(path: Path, ids: set[int]) -> TiktokenSpec:
    try:
        content: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    known = {"pattern", "special_tokens", "eos", "bos"}
    if not isinstance(content, dict) or not isinstance(content.get("pattern"), str) or set(content) - known:
        raise ValueError(f"{path}: an object with 'pattern', a string, and at most {', '.join(sorted(known - {'pattern'}))}")
    special = content.get("special_tokens", {})
    if not isinstance(special, dict) or not all(name and type(id_) is int and id_ >= 0 for name, id_ in special.items()):
        raise ValueError(f"{path}: 'special_tokens' must be an object of names and ids")
    taken = [name for name, id_ in special.items() if id_ in ids]
    if taken or len(set(special.values())) < len(special):
        raise ValueError(f"{path}: two tokens have one id: {', '.join(taken) or special}")
    for key in ("eos", "bos"):
        if content.get(key) is not None and content[key] not in special:
            raise ValueError(f"{path}: {key!r} is {content[key]!r}, which is none of its special tokens")
    return TiktokenSpec(content["pattern"], special, content.get("eos"), content.get("bos"))
