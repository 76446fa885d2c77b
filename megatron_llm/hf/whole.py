"""A folder that appears whole or not at all: written under another name, then renamed.

`hf/export.py` and `exchange/` write theirs this way, several tasks together by `together.py`: an interrupted or failed export
leaves an older one as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_llm.ops.storage import sync_folder


@contextmanager
def whole_folder(output: str | Path, overwrite: bool, what: str, foreign: Callable[[Path], str | None]) -> Iterator[Path]:
    """The folder to write into; when the block ends without an exception, it becomes `output`.

    Args:
        overwrite: replace what an earlier command wrote there.
        what: what that is, such as "export", for messages.
        foreign: why a folder is not such a thing ("has no config.json"), None if it is one: only then is it replaced.

    Raises ValueError if `output` is in the way, before the block begins.
    """
    output = local_output(output)
    check_output(output, overwrite, what, foreign)
    partial_folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a command that was interrupted
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        replace_output(partial_folder, output)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    sync_folder(output.parent)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def replace_output(folder: Path, output: Path) -> None:
    """Rename a folder to `output`, in place of what is there."""
    old = _old(output)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    folder.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def local_output(output: str | Path) -> Path:
    """The absolute path. Raises ValueError for a URL."""
    if "://" in str(output):
        raise ValueError(f"{output}: what this command writes is a local folder; copy it to where it belongs")
    return Path(output).absolute()


def check_output(output: Path, overwrite: bool, what: str, foreign: Callable[[Path], str | None]) -> None:
    """Refuse to mix with or delete what is not an older one of the same sort. Raises ValueError like `whole_folder`."""
    if _old(output).exists() and not output.exists():  # a command was killed between its two renames
        _old(output).rename(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file; {'an' if what[0] in 'aeiou' else 'a'} {what} is a folder")
    if not overwrite:
        raise ValueError(f"{output} is not empty; choose another folder, or replace it with --overwrite")
    reason = foreign(output)
    if reason is not None:
        raise ValueError(f"{output} {reason}, so it is no earlier {what} and is not deleted; choose another folder")
