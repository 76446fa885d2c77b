"""What a tokenizer is: which kind a path holds, its special ids and size, how ids become text, a fingerprint to tell two apart.

Called by `prepare/` (`encoding.py` turns text into ids), the `inspect` and `generate` commands, `exchange/imports.py`, and
`training/resolve.py`, which asks whether `data.tokenizer` is one and how many ids it has: training never tokenizes. Four kinds
of path are known:

    folder              of Hugging Face, with tokenizer.json or the vocabulary files that transformers converts
    *.json              a tokenizer.json under any name
    *.model             of sentencepiece
    *.tiktoken, *.model of tiktoken: lines of base64 and rank; see `tiktoken_file.py`

transformers is imported only where nothing else knows the answer, because it brings torch along.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_llm.data.indexed import DatasetMeta
from megatron_llm.data.tiktoken_file import TiktokenSpec, parse_rank, read_ranks, read_spec, spec_path

Kind = Literal["huggingface", "sentencepiece", "tiktoken"]

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
# Classes that add nothing to what the files of a folder say; others have bos and eos tokens of their own by default.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def tokenizer_kind(path: str | Path) -> Kind:
    """Which library a tokenizer is of, by its content. Raises ValueError if `path` is none."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        return "huggingface"
    if not path.is_file():
        raise ValueError(f"{path} is neither a tokenizer folder nor a file")
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    if parse_rank(first) is not None:
        return "tiktoken"
    if path.suffix == ".model":
        return "sentencepiece"
    raise ValueError(
        f"{path} is no tokenizer: known are Hugging Face folders, tokenizer.json, sentencepiece's .model and files of tiktoken"
    )


def fingerprint(folder: str | Path) -> str:
    """sha256 of tokenizer.json, or without one of the vocabulary files. Raises ValueError if there is none of them."""
    files = [path for name in VOCABULARY_FILES if (path := Path(folder) / name).is_file()]
    if not files:
        raise ValueError(f"{folder} is not a tokenizer folder: it has none of {', '.join(VOCABULARY_FILES)}")
    return _sha256(files[:1] if files[0].name == "tokenizer.json" else files)


def path_fingerprint(path: str | Path) -> str:
    """`fingerprint` of a folder, or the sha256 of a tokenizer that is a file (with the JSON beside a file of tiktoken)."""
    path = Path(path)
    if tokenizer_kind(path) == "huggingface":
        return fingerprint(path) if path.is_dir() else _sha256([path])
    return _sha256([file for file in (path, spec_path(path)) if file.is_file()])


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load_pretrained(folder: str | Path) -> Any:
    """The transformers tokenizer of a local folder. Raises ValueError if it cannot be loaded.

    No server is asked and no code of the folder runs; nor is the user asked whether it may.
    """
    fingerprint(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: transformers cannot load this tokenizer: {error}") from error


def load_encoder(path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder or tokenizer.json, without the truncation and padding that some of them ask for."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    encoder: Any
    if file.is_file():
        status = file.stat()
        encoder = _read_encoder(str(file), status.st_mtime_ns, status.st_size)
    else:
        encoder = getattr(load_pretrained(path), "backend_tokenizer", None)
        if encoder is None:
            raise ValueError(f"{path} has no fast tokenizer; save it with tokenizer.json first")
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


@functools.lru_cache(maxsize=1)
def _read_encoder(file: str, mtime_ns: int, size: int) -> Any:
    """Kept as long as the file is the same: a command describes its tokenizer and then uses it, and large ones load slowly."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


def load_sentencepiece(path: str | Path) -> Any:
    """The `sentencepiece.SentencePieceProcessor` of a .model file. Raises ValueError if it is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a model of sentencepiece: {error}") from error


def load_tiktoken(path: str | Path) -> tuple[Any, TiktokenSpec]:
    """The `tiktoken.Encoding` of a file, and what it was made with. Raises ValueError as `tiktoken_file.py` says."""
    files = [file.stat() for file in (Path(path), spec_path(Path(path))) if file.is_file()]
    return _read_tiktoken(str(path), *((status.st_mtime_ns, status.st_size) for status in files))


@functools.lru_cache(maxsize=1)
def _read_tiktoken(path: str, *versions: tuple[int, int]) -> tuple[Any, TiktokenSpec]:
    """Kept as `_read_encoder` is."""
    from tiktoken import Encoding

    ranks = read_ranks(Path(path))
    spec = read_spec(Path(path), ranks)
    try:
        return Encoding(Path(path).name, pat_str=spec.pattern, mergeable_ranks=ranks, special_tokens=spec.special_tokens), spec
    except ValueError as error:  # a regex that does not compile
        raise ValueError(f"{path}: tiktoken refuses it: {error}") from error


def load_decoder(path: str | Path) -> Callable[[Sequence[int]], str]:
    """A function from ids to text, special tokens spelled out, and ids that are none as `<id 100000>`.

    Raises ValueError as the loaders do.
    """
    decode: Callable[[list[int]], str]
    token: Callable[[int], Any]  # None or an error for an id that is none
    kind = tokenizer_kind(path)
    if kind == "sentencepiece":
        processor = load_sentencepiece(path)
        decode, token = processor.decode, processor.id_to_piece
    elif kind == "tiktoken":
        encoding, _ = load_tiktoken(path)
        decode, token = encoding.decode, encoding.decode_single_token_bytes
    else:
        encoder = load_encoder(path)
        decode, token = functools.partial(encoder.decode, skip_special_tokens=False), encoder.id_to_token

    def known(id_: int) -> bool:
        try:
            return token(id_) is not None
        except (KeyError, IndexError, OverflowError):  # what each library has for too large, and for negative
            return False

    def text(ids: Sequence[int]) -> str:
        runs = ((valid, list(run)) for valid, run in itertools.groupby(ids, known))
        return "".join(decode(run) if valid else "".join(f"<id {id_}>" for id_ in run) for valid, run in runs)

    return text


def describe(path: str | Path, kind: str) -> DatasetMeta:
    """The tokenizer's part of a data set description. Raises ValueError if `path` is no tokenizer that can be loaded."""
    size, bos, eos = _size_and_ends(Path(path))
    return DatasetMeta(
        kind=kind,
        tokenizer=str(path),
        tokenizer_fingerprint=path_fingerprint(path),
        vocab_size=size,
        bos_id=bos,
        eos_id=eos,
    )


def vocabulary_size(path: str | Path) -> int:
    """Number of ids that a tokenizer may give. Raises ValueError if `path` is no tokenizer that can be loaded."""
    return _size_and_ends(Path(path))[0]


def _size_and_ends(path: Path) -> tuple[int, int | None, int | None]:
    """Number of ids, bos and eos."""
    kind = tokenizer_kind(path)
    if kind == "sentencepiece":
        processor = load_sentencepiece(path)
        bos, eos = (None if id_ < 0 else id_ for id_ in (processor.bos_id(), processor.eos_id()))
        return processor.get_piece_size(), bos, eos
    if kind == "tiktoken":
        encoding, spec = load_tiktoken(path)
        return encoding.n_vocab, spec.special_tokens.get(spec.bos or ""), spec.special_tokens.get(spec.eos or "")
    encoder = load_encoder(path)
    named = _named_tokens(path if path.is_dir() else path.parent) if path.is_dir() or path.name == "tokenizer.json" else {}
    if named is None or any(token is not None and encoder.token_to_id(token) is None for token in named.values()):
        tokenizer = load_pretrained(path if path.is_dir() else path.parent)
        return len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    bos, eos = (None if (token := named.get(key)) is None else encoder.token_to_id(token) for key in ("bos_token", "eos_token"))
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    return max(len(vocabulary), max(vocabulary.values(), default=-1) + 1), bos, eos  # ids may have gaps


def _named_tokens(folder: Path) -> dict[str, str | None] | None:
    """The bos and eos token that a folder names; None if only transformers knows: no tokenizer.json, or a class's defaults.

    As in transformers, special_tokens_map.json goes before tokenizer_config.json unless that lists its added tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    class_ = config.get("tokenizer_class")
    plain = class_ in PLAIN_CLASSES or (class_ is None and not (folder / "config.json").is_file())
    named: dict[str, str | None] = {}
    for key in ("bos_token", "eos_token"):
        if key not in config and not plain:
            return None
        token = config.get(key)
        named[key] = token["content"] if isinstance(token, dict) else token
    return named


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. Raises ValueError naming the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content
