"""The small files of a Hugging Face folder that travel along with checkpoints and exports: configs, tokenizer, template.

`training/loop.py` collects them once; `checkpoint/` stores them as opaque bytes under the names given here; `hf/export.py`
puts them back. So an export needs nothing but the checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_llm.data.chat_tokenizer import reply_end_ids
from megatron_llm.data.tokenizer import load_pretrained
from megatron_llm.hf.reader import HFFolder

CONFIG = "hf/config.json"
GENERATION_CONFIG = "hf/generation_config.json"
TENSOR_DTYPES = "hf/tensor_dtypes.json"
MAX_BYTES = 64_000_000

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_MODEL_FILES = ("config.json", "generation_config.json")


def collect_assets(folder: str | Path | None, tokenizer: str | Path | None = None) -> dict[str, bytes]:
    """Asset name (`hf/FILE`) -> content.

    Args:
        folder: the model folder that a run starts from: its configs, the dtype of each tensor, its tokenizer. None: the
            model is trained from scratch.
        tokenizer: a tokenizer folder; its files replace all of `folder`'s.

    Raises ValueError if a folder is missing or a file is larger than MAX_BYTES.
    """
    assets: dict[str, bytes] = {}
    if folder is not None:
        source = HFFolder(folder)
        assets |= _read(source.path, _MODEL_FILES)
        assets[TENSOR_DTYPES] = json.dumps(source.tensor_dtypes(), indent=1).encode()
    if tokenizer is not None or folder is not None:
        assets |= _read(Path(str(tokenizer or folder)), _TOKENIZER_FILES)
    return assets


def with_tokenizer(assets: Mapping[str, bytes], tokenizer: str | Path | None) -> dict[str, bytes]:
    """Assets of an earlier run with the files of another tokenizer folder in place of theirs; as they are if there is none."""
    if tokenizer is None:
        return dict(assets)
    kept = {name: data for name, data in assets.items() if not _matches(name.removeprefix("hf/"), _TOKENIZER_FILES)}
    return kept | collect_assets(None, tokenizer)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _read(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    assets = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, patterns):
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes; files that travel with checkpoints may have {MAX_BYTES}. "
                    "Move it away if it does not belong to the tokenizer"
                )
            assets[f"hf/{path.name}"] = path.read_bytes()
    return assets


def exported_files(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """File name -> content of what an export copies as it is. Raises ValueError for a name that leaves the folder."""
    files = {}
    for name, content in assets.items():
        if not name.startswith("hf/") or name in (CONFIG, TENSOR_DTYPES):
            continue
        file = name.removeprefix("hf/")
        if file in ("", ".", "..") or Path(file).name != file or "\\" in file:
            raise ValueError(f"asset {name!r} is not a plain file name")
        files[file] = content
    return files


def special_token_ids(assets: Mapping[str, bytes]) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id for a new config.json; None where the tokenizer files name none.

    Without them transformers takes Llama's own ids, and generation would stop at some ordinary token.
    """
    settings: dict[str, Any] = json.loads(assets.get("hf/tokenizer_config.json", b"{}"))
    tokenizer: dict[str, Any] = json.loads(assets.get("hf/tokenizer.json", b"{}"))
    ids = {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens", [])}
    found: dict[str, int | None] = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        found[f"{role}_token_id"] = ids.get(token["content"] if isinstance(token, dict) else token)
    return found


def with_reply_ends(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """Assets of a model that was trained on conversations, whose generation_config.json ends texts where replies end.

    Base models end texts with another token than the one that ends a reply in the chat template, and transformers and vLLM
    would generate on. Without a chat template, or where the token is known already, nothing changes.
    """
    if not any(_matches(name.removeprefix("hf/"), _TOKENIZER_FILES) for name in assets):
        return dict(assets)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in exported_files(assets).items():
            Path(folder, name).write_bytes(content)
        if CONFIG in assets:
            Path(folder, "config.json").write_bytes(assets[CONFIG])  # the class of some tokenizers is known from it
        try:
            ends = reply_end_ids(load_pretrained(folder))
        except ValueError:  # a tokenizer that transformers does not know has no template either
            return dict(assets)
    model = json.loads(assets[CONFIG]) if CONFIG in assets else special_token_ids(assets)
    named = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if model.get(key) is not None}
    # Without the file transformers takes these from config.json, which is what the first key says.
    given: dict[str, Any] = json.loads(assets.get(GENERATION_CONFIG) or json.dumps({"_from_model_config": True, **named}))
    known = given.get("eos_token_id", named.get("eos_token_id"))
    known = known if isinstance(known, list) else [known] if known is not None else []
    missing = sorted(ends - set(known))
    if not missing:
        return dict(assets)
    text = json.dumps({**given, "eos_token_id": [*known, *missing]}, indent=2) + "\n"
    return {**assets, GENERATION_CONFIG: text.encode()}
