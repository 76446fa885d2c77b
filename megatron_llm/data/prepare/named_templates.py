"""Chat templates by name, `templates/NAME.jinja`, and tokenizers that are written with one. Called by `chat.py`.

The first line of each names the special tokens that it writes and the one that ends a reply. A tokenizer that lacks them would
spell them with ordinary tokens, so they are added to a copy of it, which `--save-tokenizer` writes, or the template is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_llm.data.tokenizer import fingerprint, load_pretrained

_HEADER = re.compile(r"\{#- special tokens: (?P<tokens>.*?); a reply ends with (?P<end>.*?) -#\}")


@dataclass(frozen=True)
class NamedTemplate:
    """Jinja text, the special tokens that it writes beside bos and eos, and that which ends a reply, None for the eos token."""

    name: str
    text: str
    tokens: tuple[str, ...] = ()
    end: str | None = None


def template_names() -> list[str]:
    """The names that `read_template` knows."""
    return sorted(path.name.removesuffix(".jinja") for path in _folder().iterdir() if path.name.endswith(".jinja"))


def read_template(name: str) -> NamedTemplate:
    """A template by name, or the text of a FILE.jinja. Raises ValueError for a name that is not known or a missing file."""
    if name.endswith((".jinja", ".j2")) or "/" in name:
        try:
            return NamedTemplate(name, Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--template {name} cannot be read: {error}") from error
    if name not in template_names():
        raise ValueError(f"--template {name}: known are {', '.join(template_names())}, or the path of a .jinja file")
    text = (_folder() / f"{name}.jinja").read_text(encoding="utf-8")
    header = _HEADER.match(text)
    assert header is not None, f"{name}.jinja does not name its special tokens"
    words = tuple(header["tokens"].split())
    return NamedTemplate(name, text, words, header["end"]) if words[0].startswith("<") else NamedTemplate(name, text)


def save_tokenizer(folder: str | Path, template: NamedTemplate | None, target: str | Path) -> list[str]:
    """Write the tokenizer of `folder` with `template` to `target`, its missing tokens added. Returns lines saying what was done.

    The token that ends a reply becomes the eos token, where all that generates looks for it. Raises ValueError if `target` is
    the folder itself or holds another tokenizer.
    """
    if Path(target).resolve() == Path(folder).resolve():
        raise ValueError(f"--save-tokenizer {target} is --tokenizer itself; name another folder")
    tokenizer = load_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template.text
    size = len(tokenizer)
    lines = []
    missing = missing_tokens(tokenizer, template)
    if missing:
        tokenizer.add_tokens([_special(token) for token in missing], special_tokens=True)
        ids = ", ".join(f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in missing)
        lines.append(
            f"special tokens added: {ids}; ids are below {len(tokenizer)} now ({size} before): if the model has fewer, "
            f"set model.resize_vocab: {len(tokenizer)}"
        )
    if template is not None and template.end is not None and tokenizer.eos_token != template.end:
        lines.append(f"eos token: {template.end} instead of {tokenizer.eos_token}")
        tokenizer.eos_token = template.end
    for name in ("is_local", "local_files_only"):  # how it was loaded is not what it is
        tokenizer.init_kwargs.pop(name, None)
    return [*_write(tokenizer, Path(target)), *lines]


def check_tokens(tokenizer: Any, template: NamedTemplate) -> None:
    """Raises ValueError if the tokenizer lacks special tokens that the template writes."""
    missing = missing_tokens(tokenizer, template)
    if missing:
        count = len(tokenizer(missing[-1], add_special_tokens=False)["input_ids"])
        raise ValueError(
            f"--template {template.name} writes {', '.join(missing)}, which this tokenizer does not have: {missing[-1]} would be "
            f"{count} ordinary tokens. --save-tokenizer DIR writes a tokenizer that has them, for the data and for training"
        )
    if template.end is None and tokenizer.eos_token is None and "eos_token" in template.text:
        raise ValueError(
            f"--template {template.name} ends replies with the eos token, and this tokenizer names none; set one there"
        )


def missing_tokens(tokenizer: Any, template: NamedTemplate | None) -> list[str]:
    """Special tokens of the template that the tokenizer would not keep whole."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [token for token in (template.tokens if template else ()) if token not in known]


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def _write(tokenizer: Any, target: Path) -> list[str]:
    """Write the tokenizer, or find that it is there already. Raises ValueError if `target` holds something else."""
    import tempfile

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary, "new")
        tokenizer.save_pretrained(new)
        if target.exists() and any(target.iterdir()):
            if _same(new, target):
                return [f"{target} holds this tokenizer already"]
            raise ValueError(f"--save-tokenizer {target}: the folder holds something else; delete it or name another")
        target.mkdir(exist_ok=True)
        for file in new.iterdir():
            file.replace(target / file.name)
    return [f"{target}: the tokenizer with its chat template; set data.tokenizer: {target}"]


def _same(new: Path, old: Path) -> bool:
    """Whether a folder holds the same tokenizer and template."""
    try:
        names = [path.name for path in new.iterdir()]
        return fingerprint(new) == fingerprint(old) and all((old / n).read_bytes() == (new / n).read_bytes() for n in names)
    except (ValueError, OSError):
        return False


def _folder() -> Any:
    return files("megatron_llm.data.prepare") / "templates"
